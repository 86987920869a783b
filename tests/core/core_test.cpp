// The test program of the core: no torch, no Python, no test library.
//
//   core_test [--seed N] [--quick] [--require avx2,avx512_vnni] [--list]
//
// Prints one line per kernel of the table and ends with "<passed> passed, <failed> failed"; exits 1 on any failure.
// --require makes a kernel this CPU cannot run a failure: for CI, where a path that silently is not tested stays green.

#include <algorithm>
#include <csignal>
#include <ctime>
#include <set>

#include "check.h"

namespace torchq::test {

void test_dispatch() {
  now("dispatch");
  check("core", find_kernel("avx1024") == nullptr && find_kernel("") == nullptr, "found a kernel that does not exist");
  check("core", !is_kernel_name("avx1024") && !is_kernel_name(""), "named a kernel that does not exist");
  check("core", last_kernel() == nullptr, "a kernel ran before any problem did");
  check("core", kernel_at(kernel_count() - 1).needs == 0, "the last kernel does not run everywhere");
  check("core", forced_kernel() == nullptr, "a kernel is forced before anyone did");
  std::set<std::string> names;
  const Kernel* best = nullptr;
  for (int i = 0; i < kernel_count(); ++i) {
    const Kernel& kernel = kernel_at(i);
    now("dispatch of %s", kernel.name);
    check("core", names.insert(kernel.name).second, "the name is taken twice");
    check("core", find_kernel(kernel.name) == &kernel, "find_kernel() finds another row");
    check("core", is_kernel_name(kernel.name), "is_kernel_name() does not know it");
    check("core", reads(kernel, kernel.layout) && layout_depth(kernel.layout) == kernel.tiling.tile.k,
          "its layout is amiss");
    check("core", reads(kernel_reference, kernel.layout), "the reference does not read its layout");
    const Kernel* small = kernel.small.kernel;
    check("core", !small || (small->layout == kernel.layout && small->small.kernel == nullptr),
          "the kernel for small problems reads other weights, or passes them on");
    check("core", !small || (small->needs & kernel.needs) == small->needs,
          "the kernel for small problems may not run where it does");
    check("core", can_run(kernel) == ((kernel.needs & ~cpu_features()) == 0), "can_run() contradicts cpu_features()");
    if (!can_run(kernel)) continue;
    if (!best) best = &kernel;
    check("core", &active_kernel() == best, "expected active kernel %s, got %s", best->name, active_kernel().name);
    force_kernel(&kernel);
    check("core", &active_kernel() == &kernel && forced_kernel() == &kernel, "forced, but %s is active",
          active_kernel().name);
    check("core", kernel_for(kernel.layout) == &kernel, "forced, but it is not taken for its layout");
    const Layout other = kernel.layout == Layout::p16c8 ? Layout::p16c4 : Layout::p16c8;
    check("core", (kernel_for(other) == nullptr) == !reads(kernel, other), "forced, but another kernel is taken");
    force_kernel(nullptr);
    check("core", &active_kernel() == best && !forced_kernel(), "the choice was not given back");
    const Kernel* reader = kernel_for(kernel.layout);
    check("core", reader && reads(*reader, kernel.layout), "nothing is taken for its layout");
  }
}

namespace {

struct Arguments {
  uint64_t seed = static_cast<uint64_t>(std::time(nullptr));
  bool quick = false, list = false;
  std::vector<std::string> required;
};

[[noreturn]] void usage(const char* wrong) {
  std::fprintf(stderr, "core_test: unexpected argument '%s'\n", wrong);
  std::fprintf(stderr, "usage: core_test [--seed N] [--quick] [--require kernel,kernel] [--list]\n");
  std::exit(2);
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> words;
  for (size_t begin = 0, end; begin <= text.size(); begin = end + 1) {
    end = std::min(text.find(',', begin), text.size());
    if (end > begin) words.push_back(text.substr(begin, end - begin));
  }
  return words;
}

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--quick")
      arguments.quick = true;
    else if (word == "--list")
      arguments.list = true;
    else if (word == "--seed" && i + 1 < argc)
      arguments.seed = std::strtoull(argv[++i], nullptr, 10);
    else if (word == "--require" && i + 1 < argc)
      arguments.required = split(argv[++i]);
    else
      usage(argv[i]);
  }
  return arguments;
}

// A touched guard page ends up here.
void on_crash(int signal) {
  std::printf("FAIL signal %d (memory outside a buffer was touched?) in: %s\n", signal, doing);
  std::fflush(stdout);
  _exit(1);
}

int list() {
  for (int i = 0; i < kernel_count(); ++i)
    if (can_run(kernel_at(i))) std::printf("%s\n", kernel_at(i).name);
  std::printf("active: %s\n", active_kernel().name);
  return tallies["core"].failed ? 1 : 0;
}

void check_required(const std::vector<std::string>& required) {
  for (const std::string& name : required) {
    now("--require %s", name.c_str());
    const Kernel* kernel = find_kernel(name.c_str());
    check("core", kernel != nullptr, "no kernel of this name was compiled in");
    if (kernel) check("core", can_run(*kernel), "this CPU cannot run it");
  }
}

void print_line(const char* name) {
  const Tally tally = tallies[name];
  std::printf("%s: %lld checks passed", name, static_cast<long long>(tally.passed));
  if (tally.failed) std::printf(", %lld FAILED", static_cast<long long>(tally.failed));
  std::printf("\n");
}

// A kernel that can run and was not checked is a failure too.
int report() {
  for (const Kernel* kernel : runnable())
    if (tallies[kernel->name].passed == 0) check(kernel->name, false, "nothing was checked");
  print_line("core");
  for (int i = 0; i < kernel_count(); ++i) {
    if (can_run(kernel_at(i)))
      print_line(kernel_at(i).name);
    else
      std::printf("%s: this CPU cannot run it\n", kernel_at(i).name);
  }
  Tally total;
  for (const auto& [name, tally] : tallies) {
    total.passed += tally.passed;
    total.failed += tally.failed;
  }
  std::printf("%lld passed, %lld failed\n", static_cast<long long>(total.passed), static_cast<long long>(total.failed));
  return total.failed ? 1 : 0;
}

}  // namespace
}  // namespace torchq::test

int main(int argc, char** argv) {
  using namespace torchq::test;
  const Arguments arguments = parse(argc, argv);
  check_required(arguments.required);
  if (arguments.list) return list();
  for (int signal : {SIGSEGV, SIGBUS, SIGILL}) std::signal(signal, on_crash);
  std::printf("seed %llu\n", static_cast<unsigned long long>(arguments.seed));
  random_source.state = arguments.seed;
  test_dispatch();
  test_numbers(arguments.quick);
  test_curves(arguments.quick);
  test_cells();
  test_norm();
  test_feedback();
  test_pack();
  test_rows(arguments.quick);
  test_schedule();
  test_parts();
  test_gemm(arguments.quick);
  test_attention();
  test_convolutions();
  test_inverted_residuals();
  return report();
}
