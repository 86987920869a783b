#include "plain_tensor.h"

#include <algorithm>
#include <cstdint>

#include "nn_module.h"

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
  PyTypeObject *tensor, *parameter;
  PyObject* dispatch_modes;                    // a function that returns how many there are
  PyObject *function_modes, *function_mode;    // a function that returns how many there are, and one that returns one
  PyTypeObject* default_device;                // the mode of torch.device(...) and of torch.set_default_device
  PyObject* tracing;                           // a function that returns something true where torch.jit traces
  PyObject* autocast;                          // likewise for autocast
  PyObject *profiler, *profiling;              // the globals of torch's profiler, and the name of its flag among them
  PyObject *forward_ad, *level;                // likewise of forward-mode derivatives, whose level is -1 outside
  PyObject* transforms;                        // a function that returns whether torch.func's are active
  Asked requires_grad, is_neg, offset, dtype;  // of a tensor
  PyObject* dtypes[4];                         // in the order of kDTypes
} torch_;

constexpr DTypePair kDTypes[] = {{DType::f32, {dlpack::kFloat, 32, 1}},
                                 {DType::u8, {dlpack::kUInt, 8, 1}},
                                 {DType::bf16, {dlpack::kBfloat, 16, 1}},
                                 {DType::f16, {dlpack::kFloat, 16, 1}}};

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

const DTypePair* const kU8 = &kDTypes[1];
const DTypePair* const kF32 = &kDTypes[0];

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

bool autocast() {
  if (at::autocast::is_autocast_enabled) return at::autocast::is_autocast_enabled(c10::DeviceType{});
  return !falsy(PyObject_CallNoArgs(torch_.autocast));
}

long function_modes() {
  PyObject* count = PyObject_CallNoArgs(torch_.function_modes);
  long modes = count ? PyLong_AsLong(count) : -1;
  Py_XDECREF(count);
  for (long i = modes - 1; i >= 0; --i) {
    PyObject* index = PyLong_FromLong(i);
    PyObject* mode = index ? PyObject_CallOneArg(torch_.function_mode, index) : nullptr;
    if (mode && Py_TYPE(mode) == torch_.default_device) --modes;
    Py_XDECREF(index);
    Py_XDECREF(mode);
  }
  if (PyErr_Occurred()) PyErr_Clear();
  return modes;
}

bool in_forward_mode() {
  PyObject* level = PyDict_GetItemWithError(torch_.forward_ad, torch_.level);
  return !level || PyLong_AsLong(level) >= 0;
}

bool plain_eager() { return plain_eager(0); }

bool plain_eager(long own_modes) {
  if (!torch_.exchange) return false;
  if (autocast()) return false;
  PyObject* modes = PyObject_CallNoArgs(torch_.dispatch_modes);
  const bool only_own = modes && PyLong_Check(modes) && PyLong_AsLong(modes) == own_modes;
  Py_XDECREF(modes);
  if (!only_own) return false;
  if (function_modes() != 0 || !falsy(PyObject_CallNoArgs(torch_.tracing)) || in_forward_mode()) return false;
  return PyDict_GetItemWithError(torch_.profiler, torch_.profiling) == Py_False;
}

bool view_of_type(PyTypeObject* type, PyObject* object, dlpack::Tensor* out) {
  return Py_TYPE(object) == type && !torch_.exchange->view(object, out) && out->device.type == dlpack::kCpu &&
         has_memory(object, *out);
}

bool view(PyObject* object, dlpack::Tensor* out) { return view_of_type(torch_.tensor, object, out); }

bool view_parameter(PyObject* object, dlpack::Tensor* out) { return view_of_type(torch_.parameter, object, out); }

bool is_negated(PyObject* x) { return !falsy(torch_.is_neg(x)); }

bool wants_gradient(PyObject* x) { return aoti_torch_grad_mode_is_enabled() && !falsy(torch_.requires_grad(x)); }

bool may_want_gradient(PyObject* x) {
  if (!PyObject_TypeCheck(x, torch_.tensor) || in_forward_mode()) return true;
  return !falsy(PyObject_CallNoArgs(torch_.transforms)) || wants_gradient(x);
}

PyObject* dtype_of(PyObject* x) {
  PyObject* dtype = torch_.dtype(x);
  Py_XDECREF(dtype);  // they live as long as the process
  return dtype;
}

PyObject* dtype_of(const DTypePair& dtype) { return torch_.dtypes[&dtype - kDTypes]; }

bool is_contiguous(const dlpack::Tensor& t) {
  int64_t expected = 1;
  for (int i = t.ndim; i-- > 0; expected *= t.shape[i])
    if (t.strides[i] != expected) return false;
  return true;
}

namespace {

// New memory for a tensor of this shape. On failure null, with a Python error set.
dlpack::ManagedTensor* allocated(int64_t* sizes, int ndim, const DTypePair& dtype) {
  dlpack::Tensor prototype{};
  prototype.device = {dlpack::kCpu, 0};
  prototype.ndim = ndim;
  prototype.shape = sizes;
  prototype.dtype = dtype.dl;
  dlpack::ManagedTensor* managed;
  const auto set_error = [](void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); };
  return torch_.exchange->allocate(&prototype, &managed, nullptr, set_error) ? nullptr : managed;
}

PyObject* imported(dlpack::ManagedTensor* managed, void** data) {
  *data = const_cast<uint8_t*>(data_of(managed->tensor));
  void* y;
  return torch_.exchange->import_tensor(managed, &y) ? nullptr : static_cast<PyObject*>(y);
}

}  // namespace

PyObject* new_output(const int64_t* shape, int ndim, int64_t n, const DTypePair& dtype, void** data) {
  int64_t sizes[kMostDims];
  std::copy_n(shape, ndim - 1, sizes);
  sizes[ndim - 1] = n;
  dlpack::ManagedTensor* managed = allocated(sizes, ndim, dtype);
  return managed ? imported(managed, data) : nullptr;
}

PyObject* new_channels_last(const int64_t* shape, int ndim, const DTypePair& dtype, void** data) {
  int64_t sizes[kMostDims], strides[kMostDims];
  std::copy_n(shape, ndim, sizes);
  dlpack::ManagedTensor* managed = allocated(sizes, ndim, dtype);
  if (!managed) return nullptr;
  int64_t stride = shape[ndim - 1];
  for (int i = ndim - 1; i >= 2; --i) strides[i] = stride, sizes[i] = shape[i - 1], stride *= sizes[i];
  strides[0] = stride, strides[1] = 1, sizes[1] = shape[ndim - 1];
  managed->tensor.shape = sizes, managed->tensor.strides = strides;  // which are copied where this is imported
  return imported(managed, data);
}

PyObject* new_heads(const int64_t (&shape)[4], const DTypePair& dtype, void** data) {
  int64_t sizes[4];
  std::copy_n(shape, 4, sizes);
  dlpack::ManagedTensor* managed = allocated(sizes, 4, dtype);
  if (!managed) return nullptr;
  int64_t strides[] = {shape[1] * shape[2] * shape[3], shape[3], shape[2] * shape[3], 1};
  std::swap(sizes[1], sizes[2]);
  managed->tensor.shape = sizes, managed->tensor.strides = strides;
  return imported(managed, data);
}

void watch_torch() {
  const py::module_ torch = py::module_::import("torch");
  const py::object tensor = torch.attr("Tensor"), torch_c = torch.attr("_C");
  torch_.autocast = forever(py::module_::import("functools").attr("partial")(torch.attr("is_autocast_enabled"), "cpu"));
  torch_.tensor = reinterpret_cast<PyTypeObject*>(forever(tensor));
  torch_.parameter = reinterpret_cast<PyTypeObject*>(forever(torch.attr("nn").attr("Parameter")));
  torch_.dispatch_modes = forever(torch_c.attr("_len_torch_dispatch_stack"));
  torch_.function_modes = forever(torch_c.attr("_len_torch_function_stack"));
  torch_.function_mode = forever(torch_c.attr("_get_function_stack_at"));
  torch_.default_device =
      reinterpret_cast<PyTypeObject*>(forever(py::module_::import("torch.utils._device").attr("DeviceContext")));
  torch_.tracing = forever(torch_c.attr("_get_tracing_state"));
  torch_.profiler = forever(py::module_::import("torch.autograd.profiler").attr("__dict__"));
  torch_.profiling = name("_is_profiler_enabled");
  torch_.forward_ad = forever(py::module_::import("torch.autograd.forward_ad").attr("__dict__"));
  torch_.level = name("_current_level");
  torch_.requires_grad = asked(tensor.attr("requires_grad"));
  torch_.is_neg = asked(tensor.attr("is_neg"));
  torch_.transforms = forever(torch_c.attr("_are_functorch_transforms_active"));
  torch_.dtype = asked(tensor.attr("dtype"));
  torch_.offset = asked(tensor.attr("storage_offset"));
  const char* dtypes[] = {"float32", "uint8", "bfloat16", "float16"};
  for (int i = 0; i < 4; ++i) torch_.dtypes[i] = forever(torch.attr(dtypes[i]));

  if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return;
  const py::capsule capsule = tensor.attr("__dlpack_c_exchange_api__");
  const auto* exchange = capsule.get_pointer<const dlpack::Exchange>();
  if (exchange->version.major != dlpack::kMajorVersion || !exchange->view) return;
  torch_.exchange = exchange;
}

}  // namespace torchq
