// torchq._C.call_convolution: torch.ops.torchq.convolution past the dispatcher, as call_linear in direct.cpp is to its
// op. With the cold caches that each convolution of a network leaves, that is 15 us. It answers NotImplemented wherever
// anything could stand between the call and the arithmetic, and to what the op would refuse or copy first.
//
// A pointwise convolution may have a range for each place, as the row of a linear layer has. It is that layer, of the
// pixels of x, with a residual that the op of a linear layer doesn't know.
//
// torchq._C.call_convolutions: several, each reading what the one before gave (modules/conv_block.py).

#include <algorithm>

#include "conv/depthwise.h"
#include "conv_call.h"
#include "direct.h"
#include "direct_call.h"
#include "direct_layer.h"
#include "linear.h"
#include "plain_tensor.h"
#include "run.h"

namespace py = pybind11;

namespace torchq {
namespace {

using conv::Axis;
using conv::Geometry;
using conv::kAxes;

constexpr int kMostQParams = 6;

// The numbers of a list, and how many they are; -1 if it is no such list.
int read(PyObject* list, int64_t (&out)[conv::kMostNumbers]) {
  if (!PyList_Check(list) || PyList_GET_SIZE(list) > conv::kMostNumbers) return -1;
  const auto count = static_cast<int>(PyList_GET_SIZE(list));
  for (int i = 0; i < count; ++i) {
    PyObject* number = PyList_GET_ITEM(list, i);
    if (!PyLong_Check(number)) return -1;
    out[i] = PyLong_AsLongLong(number);
  }
  return PyErr_Occurred() ? -1 : count;
}

int read(PyObject* list, double (&out)[kMostQParams]) {
  if (!PyList_Check(list) || PyList_GET_SIZE(list) > kMostQParams) return -1;
  const auto count = static_cast<int>(PyList_GET_SIZE(list));
  for (int i = 0; i < count; ++i) {
    PyObject* number = PyList_GET_ITEM(list, i);
    if (!PyFloat_CheckExact(number)) return -1;
    out[i] = PyFloat_AS_DOUBLE(number);
  }
  return count;
}

bool is_geometry(const Geometry& g) {
  if (g.in_channels <= 0 || g.out_channels <= 0 || g.groups <= 0) return false;
  if (g.in_channels % g.groups || g.out_channels % g.groups) return false;
  for (const Axis& axis : g.axes) {
    if (std::min({axis.size, axis.kernel, axis.stride, axis.dilation}) <= 0) return false;
    if (std::min(axis.before, axis.after) < 0) return false;
    if (std::max({axis.kernel, axis.stride, axis.dilation, axis.before, axis.after}) >= conv::kMostOfAxis) return false;
    if (axis.extent() > axis.padded()) return false;
  }
  return conv::padded_values(g) < conv::kMostValues;
}

bool is_dense(const dlpack::Tensor& t, bool channels_last) {
  return conv::is_dense(t.shape, t.strides, t.ndim, channels_last);
}

// A plain tensor of floats in either format, or of codes with the channels last.
struct Image {
  dlpack::Tensor t;
  const DTypePair* dtype;
  bool channels_last;

  bool is_codes() const { return dtype == kU8; }
  const int64_t* sizes() const { return t.shape + (is_codes() ? 1 : 2); }
  int64_t channels() const { return t.shape[is_codes() ? t.ndim - 1 : 1]; }

  bool read(PyObject* object) {
    if (!view(object, &t) || t.ndim < 3 || t.ndim > kAxes + 2 || wants_gradient(object) || is_negated(object))
      return false;
    dtype = find(t.dtype);
    if (!dtype) return false;
    channels_last = is_codes() || is_dense(t, true);
    return is_codes() ? is_contiguous(t) : channels_last || is_dense(t, false);
  }
};

bool read_weights(PyObject* packed, conv::Problem& p) {
  dlpack::Tensor t;
  const Geometry& g = p.geometry;
  if (!view(packed, &t) || t.ndim != 1 || !is_contiguous(t) || find(t.dtype) != kU8) return false;
  p.is_depthwise = g.groups > 1;
  if (p.is_depthwise && !conv::can_be_depthwise(g)) return false;
  p.weights = data_of(t), p.weights_stride = t.shape[0];
  int64_t bytes = t.shape[0];
  const int64_t plain = packed_bytes(g.out_channels, g.depth(), false);
  if (p.is_depthwise && bytes != plain) {
    const int64_t at = conv::depthwise_scale_at(g);
    if (bytes != at + g.in_channels * static_cast<int64_t>(sizeof(float))) return false;
    p.depthwise_scale = reinterpret_cast<const float*>(p.weights + at);
    bytes = plain;
  }
  const PackedHeader* header = packed_header(p.weights, bytes);
  const bool fits = header && header->n == g.out_channels && header->k == g.depth();
  return fits && !(p.has_channel_scale() && p.x.dtype == DType::u8);
}

bool read_pair(const double* pair, QParams* out) {
  if (!is_scale(pair[0]) || !(pair[1] >= 0 && pair[1] <= 255) || pair[1] != static_cast<int>(pair[1])) return false;
  *out = {static_cast<float>(pair[0]), static_cast<int32_t>(pair[1])};
  return true;
}

// None: each place has its own.
bool read_qparams(PyObject* list, conv::Problem& p) {
  if (list == Py_None) return p.x.dtype != DType::u8 && p.y.dtype == p.x.dtype && p.residual.dtype != DType::u8;
  double numbers[kMostQParams];
  const int count = read(list, numbers);
  if (count < 0 || count % 2 || (count == 0 && p.x.dtype == DType::u8)) return false;
  if ((count < 4 && p.y.dtype == DType::u8) || (count < 6 && p.residual.dtype == DType::u8)) return false;
  QParams pairs[3] = {{1.0f, 0}, {1.0f, 0}, {1.0f, 0}};
  for (int i = 0; i < count / 2; ++i)
    if (!read_pair(numbers + 2 * i, &pairs[i])) return false;
  p.x.per_sample = count == 0, p.x.qparams = pairs[0], p.y.qparams = pairs[1];
  p.residual.scale = pairs[2].scale, p.residual.zero_point = pairs[2].zero_point;
  return true;
}

// Sets what is added, of the shape of y: sizes (n, size..., channels).
bool read_residual(PyObject* object, const int64_t* sizes, int ndim, conv::Problem& p) {
  if (object == Py_None) return true;
  Image added;
  if (!added.read(object) || added.t.ndim != ndim || added.channels() != sizes[ndim - 1]) return false;
  if (added.t.shape[0] != sizes[0] || !std::equal(sizes + 1, sizes + ndim - 1, added.sizes())) return false;
  if (added.is_codes() ? !p.y.channels_last : p.y.dtype != DType::u8 && added.dtype->ours != p.y.dtype) return false;
  p.residual_last = p.y.channels_last || added.channels_last;
  if (!added.is_codes() && !is_dense(added.t, p.residual_last)) return false;
  p.residual.data = data_of(added.t), p.residual.dtype = added.dtype->ours;
  return true;
}

// Whether a convolution is a linear layer of pixels as they lie.
bool is_linear(const conv::Problem& p) {
  const Geometry& g = p.geometry;
  if (g.groups != 1 || !p.x.channels_last || !p.y.channels_last) return false;
  for (const Axis& axis : g.axes)
    if (axis.kernel != 1 || axis.stride != 1 || axis.before || axis.after) return false;
  return true;
}

// Computes it so, each row with its own scale and zero point.
void run_linear(const Kernel& kernel, const conv::Problem& p) {
  const Geometry& g = p.geometry;
  LayerNumbers layer;
  layer.per_token = true, layer.activation = p.activation;
  const Rows rows{p.x.data, p.batch * g.pixels(), g.in_channels, p.x.dtype};
  Problem product = linear_problem(layer, rows, p.weights_of(0), p.y.data, p.y.dtype);
  product.y.residual = p.residual.from(0, g.out_channels);
  run(kernel, product);
}

struct Arguments {
  PyObject *x, *packed, *numbers, *qparams, *dtype, *last, *activation, *residual;
};

// y. Null: this is not a plain call.
py::object computed(const Arguments& a) {
  Image x;
  conv::Problem p{};
  int64_t numbers[conv::kMostNumbers];
  const DTypePair* y_dtype = find(a.dtype);
  const int count = read(a.numbers, numbers);
  if (!y_dtype || !x.read(a.x) || count < conv::kHead || numbers[0] != x.t.ndim - 2) return {};
  if (count != conv::kHead + conv::kEach * numbers[0]) return {};
  p.geometry = conv::geometry_from(numbers, x.sizes());
  const Geometry& g = p.geometry;
  p.batch = x.t.shape[0];
  if (!is_geometry(g) || x.channels() != g.in_channels || p.batch <= 0) return {};
  p.x.dtype = x.dtype->ours, p.x.data = data_of(x.t), p.x.channels_last = x.channels_last;
  p.y.dtype = y_dtype->ours, p.y.channels_last = a.last == Py_True || y_dtype == kU8;
  const long activation = PyLong_Check(a.activation) ? PyLong_AsLong(a.activation) : -1;
  if (!is_activation(activation) || !read_weights(a.packed, p)) return {};
  p.activation = static_cast<Activation>(activation);

  const int ndim = x.t.ndim;
  int64_t sizes[kAxes + 2] = {p.batch};  // of y, (n, size..., channels)
  for (int d = 0; d < ndim - 2; ++d) sizes[d + 1] = g.axes[conv::kPlace[ndim - 3][d]].outputs();
  sizes[ndim - 1] = g.out_channels;
  if (!read_residual(a.residual, sizes, ndim, p) || !read_qparams(a.qparams, p)) return {};
  const bool by_places = a.qparams == Py_None;
  if (by_places && !is_linear(p)) return {};
  const Kernel* kernel = kernel_for(p.weights_of(0).layout);
  if (!kernel) return {};

  const auto packed = py::reinterpret_borrow<py::object>(a.packed);  // held while the GIL is not
  const auto residual = py::reinterpret_borrow<py::object>(a.residual);
  PyObject* made;
  if (y_dtype == kU8) {
    made = new_output(sizes, ndim, g.out_channels, *y_dtype, &p.y.data);
  } else if (p.y.channels_last) {
    made = new_channels_last(sizes, ndim, *y_dtype, &p.y.data);
  } else {
    std::rotate(sizes + 1, sizes + ndim - 1, sizes + ndim);
    made = new_output(sizes, ndim, sizes[ndim - 1], *y_dtype, &p.y.data);
  }
  auto y = py::reinterpret_steal<py::object>(made);
  if (!y) return {};
  {
    const Unlocked unlocked(p.batch * g.out_pixels() * g.group_outputs() * g.depth() >= kKeepGilBelow);
    by_places ? run_linear(*kernel, p) : run(*kernel, p);
  }
  return y;
}

PyObject* call_convolution(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    const bool plain = count == 9 && PyLong_Check(args[0]) && plain_eager(PyLong_AsLong(args[0]));
    if (!plain) return or_not_implemented({});
    return or_not_implemented(computed({args[1], args[2], args[3], args[4], args[5], args[6], args[7], args[8]}));
  });
}

// What a step of a block does: (module, what its dict must hold, geometry, qparams, out_dtype, activation).
constexpr Py_ssize_t kStep = 6;

// What these steps make of x, one after the other, each channels last.
py::object computed(PyObject* x, PyObject* steps) {
  if (!PyTuple_Check(steps)) return {};
  auto y = py::reinterpret_borrow<py::object>(x);
  const Py_ssize_t count = PyTuple_GET_SIZE(steps);
  for (Py_ssize_t i = 0; i < count && y; ++i) {
    PyObject* step = PyTuple_GET_ITEM(steps, i);
    if (!PyTuple_Check(step) || PyTuple_GET_SIZE(step) != kStep) return {};
    const auto item = [&](Py_ssize_t at) { return PyTuple_GET_ITEM(step, at); };
    const py::object packed = packed_of(item(0), item(1));
    if (!packed) return {};
    y = computed({y.ptr(), packed.ptr(), item(2), item(3), item(4), Py_True, item(5), Py_None});
  }
  return y;
}

PyObject* call_convolutions(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    const bool plain = count == 3 && PyLong_Check(args[0]) && plain_eager(PyLong_AsLong(args[0]));
    return or_not_implemented(plain ? computed(args[1], args[2]) : py::object());
  });
}

PyMethodDef methods[] = {
    {"call_convolution", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_convolution)), METH_FASTCALL,
     "call_convolution(own_modes, x, packed, geometry, qparams, out_dtype, channels_last, activation, residual): what "
     "the op gives for the other arguments, inside so many dispatch modes of torchq's own; or NotImplemented. qparams "
     "None: of a pointwise convolution, a range for each place."},
    {"call_convolutions", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_convolutions)), METH_FASTCALL,
     "call_convolutions(own_modes, x, steps): what a row of convolutions makes of x, channels last, each step (module, "
     "facts, geometry, qparams, out_dtype, activation); NotImplemented as well where the dict of a module holds "
     "something else than these facts."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct_conv(py::module_& module) { PyModule_AddFunctions(module.ptr(), methods); }

}  // namespace torchq
