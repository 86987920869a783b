// torchq._C.call_convolution: torch.ops.torchq.convolution past the dispatcher, as call_linear in direct.cpp is to its
// op. With the cold caches that each convolution of a network leaves, that is 15 us. It answers NotImplemented wherever
// anything could stand between the call and the arithmetic, and to what the op would refuse or copy first.
//
// A pointwise convolution may have a range for each place, as the row of a linear layer has. It is that layer, of the
// pixels of x, with a residual that the op of a linear layer doesn't know.
//
// torchq._C.call_convolutions: several, each reading what the one before gave (modules/conv_block.py).

#include <algorithm>
#include <vector>

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

// Floats in either format, or codes with the channels last.
struct Image {
  int ndim;
  int64_t sizes[kAxes + 2];  // (n, size..., channels)
  const DTypePair* dtype;
  bool channels_last;
  const void* data;  // null: they are still to be computed

  bool is_codes() const { return dtype == kU8; }
  int64_t channels() const { return sizes[ndim - 1]; }

  // Of a plain tensor.
  bool read(PyObject* object) {
    dlpack::Tensor t;
    if (!view(object, &t) || t.ndim < 3 || t.ndim > kAxes + 2 || wants_gradient(object) || is_negated(object))
      return false;
    ndim = t.ndim, dtype = find(t.dtype), data = data_of(t);
    if (!dtype) return false;
    std::copy_n(t.shape, ndim, sizes);
    if (!is_codes()) std::rotate(sizes + 1, sizes + 2, sizes + ndim);
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

// Sets what is added to y.
bool read_residual(PyObject* object, const Image& y, conv::Problem& p) {
  if (object == Py_None) return true;
  Image added;
  if (!added.read(object) || added.ndim != y.ndim || !std::equal(y.sizes, y.sizes + y.ndim, added.sizes)) return false;
  if (y.channels_last ? !added.channels_last : added.is_codes()) return false;
  if (!added.is_codes() && !y.is_codes() && added.dtype != y.dtype) return false;
  p.residual_last = added.channels_last;
  p.residual.data = added.data, p.residual.dtype = added.dtype->ours;
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

// That layer, each row with its own scale and zero point.
Problem linear_of(const conv::Problem& p) {
  const Geometry& g = p.geometry;
  LayerNumbers layer;
  layer.per_token = true, layer.activation = p.activation;
  const Rows rows{p.x.data, p.batch * g.pixels(), g.in_channels, p.x.dtype};
  Problem product = linear_problem(layer, rows, p.weights_of(0), p.y.data, p.y.dtype);
  product.y.residual = p.residual.from(0, g.out_channels);
  return product;
}

struct Arguments {
  PyObject *packed, *numbers, *qparams, *dtype, *last, *activation, *residual;
};

// A call as it was read. x and y may be still to come.
struct Call {
  conv::Problem p{};
  Image y;
  bool by_places;  // a linear layer of pixels
  const Kernel* kernel;
  py::object packed, residual;  // held while the GIL is not

  int64_t work() const {
    const Geometry& g = p.geometry;
    return p.batch * g.out_pixels() * g.group_outputs() * g.depth();
  }
};

// False: this is not a plain call.
bool read_call(const Image& x, const Arguments& a, Call& call) {
  conv::Problem& p = call.p;
  Image& y = call.y;
  int64_t numbers[conv::kMostNumbers];
  const int count = read(a.numbers, numbers);
  y.dtype = find(a.dtype);
  if (!y.dtype || count < conv::kHead || numbers[0] != x.ndim - 2) return false;
  if (count != conv::kHead + conv::kEach * numbers[0]) return false;
  p.geometry = conv::geometry_from(numbers, x.sizes + 1);
  const Geometry& g = p.geometry;
  p.batch = x.sizes[0];
  if (!is_geometry(g) || x.channels() != g.in_channels || p.batch <= 0) return false;
  y.channels_last = a.last == Py_True || y.is_codes();
  p.x.dtype = x.dtype->ours, p.x.data = x.data, p.x.channels_last = x.channels_last;
  p.y.dtype = y.dtype->ours, p.y.channels_last = y.channels_last;
  const long activation = PyLong_Check(a.activation) ? PyLong_AsLong(a.activation) : -1;
  if (!is_activation(activation) || !read_weights(a.packed, p)) return false;
  p.activation = static_cast<Activation>(activation);

  y.ndim = x.ndim, y.sizes[0] = p.batch, y.sizes[y.ndim - 1] = g.out_channels, y.data = nullptr;
  for (int d = 0; d < y.ndim - 2; ++d) y.sizes[d + 1] = g.axes[conv::kPlace[y.ndim - 3][d]].outputs();
  if (!read_residual(a.residual, y, p) || !read_qparams(a.qparams, p)) return false;
  call.by_places = a.qparams == Py_None;
  if (call.by_places && !is_linear(p)) return false;
  call.kernel = kernel_for(p.weights_of(0).layout);
  call.packed = py::reinterpret_borrow<py::object>(a.packed);
  call.residual = py::reinterpret_borrow<py::object>(a.residual);
  return call.kernel != nullptr;
}

// A new tensor for y; null with a Python error.
py::object new_output(Call& call) {
  Image& y = call.y;
  void*& data = call.p.y.data;
  PyObject* made;
  if (y.is_codes()) {
    made = torchq::new_output(y.sizes, y.ndim, y.channels(), *y.dtype, &data);
  } else if (y.channels_last) {
    made = new_channels_last(y.sizes, y.ndim, *y.dtype, &data);
  } else {
    int64_t sizes[kAxes + 2] = {y.sizes[0], y.channels()};
    std::copy_n(y.sizes + 1, y.ndim - 2, sizes + 2);
    made = torchq::new_output(sizes, y.ndim, sizes[y.ndim - 1], *y.dtype, &data);
  }
  return py::reinterpret_steal<py::object>(made);
}

void run_alone(const Call& call) { call.by_places ? run(*call.kernel, linear_of(call.p)) : run(*call.kernel, call.p); }

// y. Null: this is not a plain call.
py::object computed(PyObject* x, const Arguments& a) {
  Image image;
  Call call;
  if (!image.read(x) || !read_call(image, a, call)) return {};
  py::object y = new_output(call);
  if (!y) return {};
  const Unlocked unlocked(call.work() >= kKeepGilBelow);
  run_alone(call);
  return y;
}

PyObject* call_convolution(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    const bool plain = count == 9 && PyLong_Check(args[0]) && plain_eager(PyLong_AsLong(args[0]));
    if (!plain) return or_not_implemented({});
    return or_not_implemented(computed(args[1], {args[2], args[3], args[4], args[5], args[6], args[7], args[8]}));
  });
}

// What a step of a block does: (module, what its dict must hold, geometry, qparams, out_dtype, activation).
constexpr Py_ssize_t kStep = 6;

// Reads the steps from x on, each of whose y is the next one's x. The last one adds the residual, and gives its
// channels last if `last` is True; all others have them last.
bool read_steps(const Image& x, PyObject* steps, PyObject* residual, PyObject* last, std::vector<Call>& calls) {
  if (!PyTuple_Check(steps)) return false;
  const Py_ssize_t count = PyTuple_GET_SIZE(steps);
  calls.resize(count);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* step = PyTuple_GET_ITEM(steps, i);
    if (!PyTuple_Check(step) || PyTuple_GET_SIZE(step) != kStep) return false;
    const auto item = [&](Py_ssize_t at) { return PyTuple_GET_ITEM(step, at); };
    const py::object packed = packed_of(item(0), item(1));
    const bool ends = i + 1 == count;
    if (!packed) return false;
    const Arguments a{
        packed.ptr(), item(2), item(3), item(4), ends ? last : Py_True, item(5), ends ? residual : Py_None};
    if (!read_call(i ? calls[i - 1].y : x, a, calls[i])) return false;
  }
  return count > 0;
}

// Some of the calls from this one on, whose x is there, that are computed at once: an inverted residual, or one alone.
struct Together {
  Problem expand, project;
  conv::Inverted inverted{};
  size_t count = 1;
  int64_t work;

  Together(const std::vector<Call>& calls, size_t first) : work(calls[first].work()) {
    const auto is_row = [&](size_t i) { return i < calls.size() && calls[i].by_places && between_floats(calls[i].p); };
    const size_t depthwise = first + is_row(first);
    if (depthwise == calls.size()) return;
    const conv::Problem& p = calls[depthwise].p;
    if (!p.multiplies_floats() || !between_floats(p) || !p.y.channels_last || p.residual.data) return;
    if (depthwise > first) expand = linear_of(calls[first].p), inverted.expand = &expand;
    if (is_row(depthwise + 1)) project = linear_of(calls[depthwise + 1].p), inverted.project = &project;
    inverted.depthwise = &p;
    const size_t all = depthwise + 1 + is_row(depthwise + 1) - first;
    int64_t sum = 0;
    for (size_t i = first; i < first + all; ++i) {
      if (calls[i].kernel != calls[first].kernel) return;
      sum += calls[i].work();
    }
    if (all > 1 && pays(*calls[first].kernel, inverted)) count = all, work = sum;
  }
  Together(const Together&) = delete;
  Together& operator=(const Together&) = delete;

  static bool between_floats(const conv::Problem& p) { return p.x.dtype == DType::f32 && p.y.dtype == DType::f32; }
};

// What these steps make of x, one after the other.
py::object computed(PyObject* x, PyObject* steps, PyObject* residual, PyObject* last) {
  Image image;
  std::vector<Call> calls;
  if (!image.read(x) || !read_steps(image, steps, residual, last, calls)) return {};
  auto y = py::reinterpret_borrow<py::object>(x);
  const void* data = image.data;
  for (size_t i = 0; i < calls.size();) {
    calls[i].p.x.data = data;
    Together together(calls, i);
    Call& ends = calls[i + together.count - 1];
    py::object next = new_output(ends);
    if (!next) return {};
    together.project.y.data = ends.p.y.data;
    {
      const Unlocked unlocked(together.work >= kKeepGilBelow);
      together.count > 1 ? run(*ends.kernel, together.inverted) : run_alone(ends);
    }
    y = std::move(next), data = ends.p.y.data, i += together.count;
  }
  return y;
}

PyObject* call_convolutions(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    const bool plain = count == 5 && PyLong_Check(args[0]) && plain_eager(PyLong_AsLong(args[0]));
    return or_not_implemented(plain ? computed(args[1], args[2], args[3], args[4]) : py::object());
  });
}

PyMethodDef methods[] = {
    {"call_convolution", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_convolution)), METH_FASTCALL,
     "call_convolution(own_modes, x, packed, geometry, qparams, out_dtype, channels_last, activation, residual): what "
     "the op gives for the other arguments, inside so many dispatch modes of torchq's own; or NotImplemented. qparams "
     "None: of a pointwise convolution, a range for each place."},
    {"call_convolutions", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_convolutions)), METH_FASTCALL,
     "call_convolutions(own_modes, x, steps, residual, channels_last): what a row of convolutions makes of x, each "
     "step "
     "(module, facts, geometry, qparams, out_dtype, activation); residual, and where the channels are, are those of "
     "the "
     "last one. NotImplemented as well where the dict of a module holds something else than these facts."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct_conv(py::module_& module) { PyModule_AddFunctions(module.ptr(), methods); }

}  // namespace torchq
