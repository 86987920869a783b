// torchq._C.call_linear: the call of a QuantizedLinear without nn.Module's and the dispatcher's shares of it. They take
// 0.7 us and 1.5 to 3 us before any arithmetic, more than a layer of 64 x 64 takes. torchq._C.call_fused is the same
// together with the activation that follows in an Int8Sequential, and with u8 codes from layer to layer.
//
// The module's state is read from its dict. A torch.Tensor is read where it lies, through DLPack's exchange table. That
// is a C struct which torch publishes for this purpose: it needs no torch header of unstable ABI, counts no references
// and copies no shape.
//
// This serves plain eager calls on plain tensors. In all other cases (hooks, subclasses, modes, transforms, tracing,
// gradients, the profiler, any argument that the op would refuse) it returns NotImplemented, and the caller takes the
// usual way, which does the work or says what is wrong. So there are no messages here. What it accepts it computes
// exactly as forward() and the op would: linear.h fills the Problem for both.
//
// What is called from Python here throws nothing: CPython has no way to pass a C++ exception on. Another thread may
// give the module another packed weight whenever the GIL is released, which calls of torch's functions do, too; so the
// packed weight is held by a reference from when it is read, and x by the caller.

#include "direct.h"

#include <exception>
#include <new>

#include "dlpack.h"
#include "linear.h"
#include "nn_module.h"
#include "run.h"

namespace py = pybind11;

// What torch keeps for each thread, as its libraries export it. The first is part of the stable ABI. The second is not,
// and so it may be absent: then Python is asked, which takes 0.1 us.
extern "C" __attribute__((visibility("default"))) bool aoti_torch_grad_mode_is_enabled();
namespace c10 {
enum class DeviceType : int8_t;
}
namespace at::autocast {
__attribute__((weak, visibility("default"))) bool is_autocast_enabled(c10::DeviceType);
}

namespace torchq {
namespace {

// Multiply-adds, about 5 us. A shorter product keeps the GIL: to wake a thread that waits for it would take longer.
constexpr int64_t kKeepGilBelow = 1 << 20;

// Below this address a pointer may be no address but the offset of a view into a storage that was freed. Memory of
// today's systems lies above, except for small blocks of a program that is not position-independent.
constexpr uintptr_t kSurelyMemory = uintptr_t{1} << 36;

// Something of a tensor that Python reads as a method of no arguments or as an attribute: called where it ends up.
struct Asked {
  PyObject* descriptor;
  PyCFunction method;
  getter attribute;
  void* closure;

  PyObject* operator()(PyObject* tensor) const {
    if (method) return method(tensor, nullptr);
    if (attribute) return attribute(tensor, closure);
    return Py_TYPE(descriptor)->tp_call ? PyObject_Vectorcall(descriptor, &tensor, 1, nullptr)
                                        : Py_TYPE(descriptor)->tp_descr_get(descriptor, tensor, nullptr);
  }
};

// What tells a plain eager call, as Python objects that live as long as the process.
struct Torch {
  const dlpack::Exchange* exchange;
  PyTypeObject* tensor;
  PyObject* unusual[3];                 // functions that return something true where a mode or tracing is active
  PyObject* autocast;                   // likewise for autocast
  PyObject *profiler, *profiling;       // the globals of torch's profiler, and the name of its flag among them
  PyObject *forward_ad, *level;         // likewise of forward-mode derivatives, whose level is -1 outside
  Asked requires_grad, is_neg, offset;  // of a tensor
  PyObject* dtypes[4];                  // in the order of kDTypes
} torch_;

// Names of a QuantizedLinear's attributes.
struct Names {
  PyObject *buffers, *packed, *input_qparams;
  PyObject *training, *p;  // of any module, and of a Dropout
} names;

struct DTypePair {
  DType ours;
  dlpack::DataType dl;
};
constexpr DTypePair kDTypes[] = {{DType::f32, {dlpack::kFloat, 32, 1}},
                                 {DType::u8, {dlpack::kUInt, 8, 1}},
                                 {DType::bf16, {dlpack::kBfloat, 16, 1}},
                                 {DType::f16, {dlpack::kFloat, 16, 1}}};
constexpr const DTypePair* kU8 = &kDTypes[1];

const DTypePair* find(const dlpack::DataType& type) {
  for (const DTypePair& p : kDTypes)
    if (p.dl.code == type.code && p.dl.bits == type.bits && type.lanes == 1) return &p;
  return nullptr;
}

const DTypePair* find(PyObject* torch_dtype) {
  for (int i = 0; i < 4; ++i)
    if (torch_.dtypes[i] == torch_dtype) return &kDTypes[i];
  return nullptr;
}

// Of the CPU, in this thread.
bool autocast() {
  if (at::autocast::is_autocast_enabled) return at::autocast::is_autocast_enabled(c10::DeviceType{});
  return !falsy(PyObject_CallNoArgs(torch_.autocast));
}

bool plain_eager() {
  if (autocast()) return false;
  for (PyObject* f : torch_.unusual)
    if (!falsy(PyObject_CallNoArgs(f))) return false;
  PyObject* level = PyDict_GetItemWithError(torch_.forward_ad, torch_.level);
  if (!level || PyLong_AsLong(level) >= 0) return false;
  return PyDict_GetItemWithError(torch_.profiler, torch_.profiling) == Py_False;
}

const uint8_t* data_of(const dlpack::Tensor& t) { return static_cast<const uint8_t*>(t.data) + t.byte_offset; }

// Whether there is memory at all. There is none under the wrappers of functionalize, in a tensor of zeros that torch
// does not store, and where a storage was resized to 0; a view into such a storage has its offset for a pointer.
bool has_memory(PyObject* object, const dlpack::Tensor& t) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(data_of(t));
  if (address >= kSurelyMemory || address == 0) return address;
  PyObject* offset = torch_.offset(object);
  const long long elements = offset ? PyLong_AsLongLong(offset) : 0;
  Py_XDECREF(offset);
  return offset && address != static_cast<uintptr_t>(elements) * (t.dtype.bits / 8);
}

// The tensor as it lies in memory, if it is dense and on the CPU. Inside a transform such as vmap a wrapped tensor
// fails here, since it has no memory of its own, and a plain one may be read like any other.
bool view(PyObject* object, dlpack::Tensor* out) {
  return Py_TYPE(object) == torch_.tensor && !torch_.exchange->view(object, out) && out->device.type == dlpack::kCpu &&
         has_memory(object, *out);
}

// Whether torch negates the values lazily, when they are read: as of the imaginary part of a conjugate. DLPack does not
// say it.
bool is_negated(PyObject* x) { return !falsy(torch_.is_neg(x)); }

// Whether autograd wants to know of a product with x.
bool wants_gradient(PyObject* x) { return aoti_torch_grad_mode_is_enabled() && !falsy(torch_.requires_grad(x)); }

// Every stride must be exactly that of a contiguous tensor, even in a dimension of size 1, where any would do.
bool is_contiguous(const dlpack::Tensor& t) {
  int64_t expected = 1;
  for (int i = t.ndim; i-- > 0; expected *= t.shape[i])
    if (t.strides[i] != expected) return false;
  return true;
}

// A new torch.Tensor with the leading dimensions of x and n columns, and where its data lies. On failure null, with a
// Python error set.
PyObject* new_output(const dlpack::Tensor& x, int64_t n, const DTypePair& dtype, void** data) {
  int64_t shape[64];
  for (int i = 0; i + 1 < x.ndim; ++i) shape[i] = x.shape[i];
  shape[x.ndim - 1] = n;
  dlpack::Tensor prototype = x;
  prototype.shape = shape;
  prototype.dtype = dtype.dl;
  dlpack::ManagedTensor* managed;
  const auto set_error = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); };
  if (torch_.exchange->allocate(&prototype, &managed, nullptr, set_error)) return nullptr;
  *data = const_cast<uint8_t*>(data_of(managed->tensor));
  void* y;
  if (torch_.exchange->import_tensor(managed, &y)) return nullptr;
  return static_cast<PyObject*>(y);
}

// What a product is made of beside x.
struct Layer {
  py::object packed;
  const DTypePair* codes_of = nullptr;  // if x is codes: of the floats that they stand for; y is such a float
  bool gives_codes = false;
  LayerNumbers numbers;
};

// The header of packed weights, or null.
const PackedHeader* header_of(PyObject* object) {
  dlpack::Tensor packed;
  const bool bytes = view(object, &packed) && packed.ndim == 1 && is_contiguous(packed) && find(packed.dtype) == kU8;
  return bytes ? packed_header(data_of(packed), packed.shape[0]) : nullptr;
}

bool fits(const dlpack::Tensor& x, const PackedHeader& weights) {
  return x.ndim >= 1 && x.ndim <= 64 && x.shape[x.ndim - 1] == weights.k && is_contiguous(x);
}

// The GIL, given away for as long as this lives, whatever is thrown.
class Unlocked {
 public:
  explicit Unlocked(bool yes) : state_(yes ? PyEval_SaveThread() : nullptr) {}
  ~Unlocked() {
    if (state_) PyEval_RestoreThread(state_);
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

// y. Null without an error set: this is not a plain call.
py::object multiply(PyObject* x_object, const Layer& layer) {
  dlpack::Tensor x;
  if (!torch_.exchange || !plain_eager() || !view(x_object, &x)) return {};
  const DTypePair* x_dtype = find(x.dtype);
  const PackedHeader* weights = header_of(layer.packed.ptr());
  if (!x_dtype || !weights || (x_dtype == kU8) != static_cast<bool>(layer.codes_of)) return {};
  if (layer.codes_of && weights->has_channel_scale) return {};
  if (!fits(x, *weights)) return {};
  if (wants_gradient(x_object) || is_negated(x_object)) return {};
  int64_t count = 1;
  for (int i = 0; i + 1 < x.ndim; ++i) count *= x.shape[i];
  const Kernel* kernel = kernel_for(weights->layout);
  if (count == 0 || weights->n == 0 || !kernel) return {};

  const DTypePair* y_dtype = layer.gives_codes ? kU8 : layer.codes_of ? layer.codes_of : x_dtype;
  void* data;
  auto y = py::reinterpret_steal<py::object>(new_output(x, weights->n, *y_dtype, &data));
  if (!y) return {};
  const Rows rows{data_of(x), count, weights->k, x_dtype->ours};
  const Problem problem = linear_problem(layer.numbers, rows, *weights, data, y_dtype->ours);
  {
    const Unlocked unlocked(count * weights->n * weights->k >= kKeepGilBelow);
    run(*kernel, problem);
  }
  return y;
}

// y, or NotImplemented for null. If something went wrong, the op will meet it again and say what.
PyObject* or_not_implemented(py::object y) {
  if (y) return y.release().ptr();
  PyErr_Clear();
  Py_RETURN_NOTIMPLEMENTED;
}

// What `f` returns; null, with a Python error set, for what it throws.
template <class F>
PyObject* without_exceptions(const F& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    PyErr_SetString(PyExc_MemoryError, "QuantizedLinear: out of memory for what the product needs beside its output");
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  } catch (...) {
    PyErr_SetString(PyExc_RuntimeError, "QuantizedLinear: an unknown C++ exception");
  }
  return nullptr;
}

bool read(PyObject* value, bool (*allowed)(int64_t), int32_t* out) {
  if (!value || !PyLong_Check(value)) return false;
  const long number = PyLong_AsLong(value);
  *out = static_cast<int32_t>(number);
  return allowed(number);
}

bool read_scale(PyObject* value, float* out) {
  if (!PyFloat_CheckExact(value)) return false;
  const double number = PyFloat_AS_DOUBLE(value);
  *out = static_cast<float>(number);
  return is_scale(number);
}

// A pair (scale, zero_point).
bool read(PyObject* value, QParams* out) {
  return value && PyTuple_Check(value) && PyTuple_GET_SIZE(value) == 2 &&
         read_scale(PyTuple_GET_ITEM(value, 0), &out->scale) &&
         read(PyTuple_GET_ITEM(value, 1), is_zero_point, &out->zero_point);
}

// The attributes of a QuantizedLinear. They mean here what its forward() makes of them as arguments of the op.
bool read(PyObject* state, Layer* out) {
  PyObject *buffers = PyDict_GetItemWithError(state, names.buffers),
           *pair = PyDict_GetItemWithError(state, names.input_qparams);
  if (!buffers || !pair) return false;
  out->packed = py::reinterpret_borrow<py::object>(PyDict_GetItemWithError(buffers, names.packed));
  out->numbers.per_token = pair == Py_None;
  return out->packed && (out->numbers.per_token || read(pair, &out->numbers.x));
}

PyObject* is_plain(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return PyBool_FromLong(count == 2 && plain_state(args[0], args[1]));
}

PyObject* is_plain_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  PyObject* state = count == 3 ? plain_state(args[0], args[1]) : nullptr;
  Layer layer;
  dlpack::Tensor x;
  const bool plain = state && read(state, &layer) && torch_.exchange && plain_eager() && view(args[2], &x);
  const PackedHeader* weights = plain ? header_of(layer.packed.ptr()) : nullptr;
  PyErr_Clear();
  return PyBool_FromLong(weights && fits(x, *weights) && !wants_gradient(args[2]) && !is_negated(args[2]) &&
                         find(x.dtype) && find(x.dtype) != kU8);
}

PyObject* is_autocast_enabled(PyObject*, PyObject*) { return PyBool_FromLong(autocast()); }

PyObject* call_linear(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    PyObject* state = count == 3 ? plain_state(args[0], args[1]) : nullptr;
    Layer layer;
    return or_not_implemented(state && read(state, &layer) ? multiply(args[2], layer) : py::object());
  });
}

// Whether these modules, which the layer computes or skips, have no hooks, and no Dropout among them is in training.
bool are_plain(PyObject* modules) {
  if (!PyTuple_Check(modules)) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(modules); ++i) {
    PyObject* module = PyTuple_GET_ITEM(modules, i);
    PyObject* state = plain_state(module, reinterpret_cast<PyObject*>(Py_TYPE(module)));
    if (!state) return false;
    if (PyDict_GetItemWithError(state, names.p) && PyDict_GetItemWithError(state, names.training) != Py_False)
      return false;
  }
  return true;
}

// What codes stand for: a pair (dtype, qparams).
bool read_codes(PyObject* codes, Layer* out) {
  if (!PyTuple_Check(codes) || PyTuple_GET_SIZE(codes) != 2 || out->numbers.per_token) return false;
  out->codes_of = find(PyTuple_GET_ITEM(codes, 0));
  return out->codes_of && out->codes_of != kU8 && read(PyTuple_GET_ITEM(codes, 1), &out->numbers.x);
}

PyObject* call_fused(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    PyObject* state = count == 8 ? plain_state(args[0], args[1]) : nullptr;
    if (!state) Py_RETURN_NOTIMPLEMENTED;
    PyObject *x = args[2], *codes = args[3], *reader = args[6];
    Layer layer;
    LayerNumbers& numbers = layer.numbers;
    int32_t activation;
    if (!read(state, &layer) || !read(args[4], is_activation, &activation) || !are_plain(args[5]))
      return or_not_implemented({});
    numbers.activation = static_cast<Activation>(activation);
    if (codes != Py_None && !read_codes(codes, &layer)) return or_not_implemented({});
    if (reader != Py_None) {
      layer.gives_codes = plain_state(reader, args[1]) && !numbers.per_token && read(args[7], &numbers.y);
      if (!layer.gives_codes) return or_not_implemented({});
    }
    return or_not_implemented(multiply(x, layer));
  });
}

PyMethodDef methods[] = {
    {"is_plain", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(is_plain)), METH_FASTCALL,
     "is_plain(module, cls): whether a call of this nn.Module is nothing but cls.forward()."},
    {"is_plain_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(is_plain_call)), METH_FASTCALL,
     "is_plain_call(module, cls, x): whether call_linear would take these, as far as can be told without computing."},
    {"is_autocast_enabled", is_autocast_enabled, METH_NOARGS,
     "is_autocast_enabled(): torch.is_autocast_enabled('cpu'), in a fifth of its time."},
    {"call_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_linear)), METH_FASTCALL,
     "call_linear(module, cls, x): cls.forward(module, x) of a QuantizedLinear, or NotImplemented where only "
     "nn.Module.__call__ and the op will do."},
    {"call_fused", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_fused)), METH_FASTCALL,
     "call_fused(module, cls, x, codes, activation, between, reader, y_qparams): the same with an activation, and with "
     "u8 codes, in qparams that the caller gives, since those of a layer may change between two calls; "
     "NotImplemented as well if any of the modules must be called by itself."},
    {nullptr, nullptr, 0, nullptr}};

Asked asked(const py::object& of_tensor) {
  Asked out{forever(of_tensor), nullptr, nullptr, nullptr};
  if (Py_TYPE(out.descriptor) == &PyMethodDescr_Type) {
    const PyMethodDef* method = reinterpret_cast<PyMethodDescrObject*>(out.descriptor)->d_method;
    if (method->ml_flags == METH_NOARGS) out.method = method->ml_meth;
  } else if (Py_TYPE(out.descriptor) == &PyGetSetDescr_Type) {
    const PyGetSetDef* attribute = reinterpret_cast<PyGetSetDescrObject*>(out.descriptor)->d_getset;
    out.attribute = attribute->get, out.closure = attribute->closure;
  }
  return out;
}

}  // namespace

void add_direct_calls(py::module_& module) {
  watch_nn_module();
  names = {name("_buffers"), name("packed"), name("input_qparams"), name("training"), name("p")};
  PyModule_AddFunctions(module.ptr(), methods);
  const py::module_ torch = py::module_::import("torch");
  const py::object tensor = torch.attr("Tensor"), torch_c = torch.attr("_C");
  torch_.autocast = forever(py::module_::import("functools").attr("partial")(torch.attr("is_autocast_enabled"), "cpu"));
  if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return;
  const py::capsule capsule = tensor.attr("__dlpack_c_exchange_api__");
  const auto* exchange = capsule.get_pointer<const dlpack::Exchange>();
  if (exchange->version.major != dlpack::kMajorVersion || !exchange->view) return;

  torch_.tensor = reinterpret_cast<PyTypeObject*>(forever(tensor));
  torch_.unusual[0] = forever(torch_c.attr("_len_torch_dispatch_stack"));
  torch_.unusual[1] = forever(torch_c.attr("_len_torch_function_stack"));
  torch_.unusual[2] = forever(torch_c.attr("_get_tracing_state"));
  torch_.profiler = forever(py::module_::import("torch.autograd.profiler").attr("__dict__"));
  torch_.profiling = name("_is_profiler_enabled");
  torch_.forward_ad = forever(py::module_::import("torch.autograd.forward_ad").attr("__dict__"));
  torch_.level = name("_current_level");
  torch_.requires_grad = asked(tensor.attr("requires_grad"));
  torch_.is_neg = asked(tensor.attr("is_neg"));
  torch_.offset = asked(tensor.attr("storage_offset"));
  const char* dtypes[] = {"float32", "uint8", "bfloat16", "float16"};
  for (int i = 0; i < 4; ++i) torch_.dtypes[i] = forever(torch.attr(dtypes[i]));
  torch_.exchange = exchange;
}

}  // namespace torchq
