// torchq._C.call_embedding_sum: tables looked up, added and normalized in one call (torchq/modules/embedding_sum.py).
// As call_linear in direct.cpp it answers NotImplemented wherever anything could stand between the calls of the
// children and the arithmetic.

#include <algorithm>
#include <vector>

#include "direct.h"
#include "direct_call.h"
#include "direct_layer.h"
#include "nn_module.h"
#include "run.h"

namespace py = pybind11;

namespace torchq {
namespace {

struct Names {
  PyObject *dtype, *weight, *max_norm;
} names;

// What the terms and the norm must be.
struct Kinds {
  PyObject *int8_table, *float_table, *norm;
};

// The sum of tables that is computed.
struct Sum {
  int64_t shape[kMostDims];  // of the indices, all together, and then of y
  int ndim = 0;
  int64_t count = 1;
  std::vector<TableRows> terms;
  std::vector<std::vector<int64_t>> rows;  // of each term
  std::vector<std::vector<float>> values;  // of int8 tables whose rows are made once
  std::vector<py::object> held;            // parameters, for as long as they are read
};

bool is_float32(PyObject* state) {
  const DTypePair* dtype = find(PyDict_GetItemWithError(state, names.dtype));
  return dtype && dtype->ours == DType::f32;
}

bool view_bytes(PyObject* object, dlpack::Tensor* out) {
  return view(object, out) && find(out->dtype) == kU8 && is_contiguous(*out);
}

// The table of a QuantizedEmbedding: rows of codes with their scales, or packed weights; and perhaps residuals.
bool read_table(PyObject* packed, PyObject* residual, Table* out) {
  dlpack::Tensor t, more;
  if (!view_bytes(packed, &t)) return false;
  if (t.ndim == 2) {
    *out = {t.shape[0], t.shape[1] - int64_t{sizeof(float)}, data_of(t), nullptr};
  } else {
    const PackedHeader* header = t.ndim == 1 ? packed_header(data_of(t), t.shape[0]) : nullptr;
    if (!header) return false;
    *out = {header->n, header->k, nullptr, header};
  }
  if (residual == Py_None) return true;
  if (!view_bytes(residual, &more) || more.ndim != 2 || more.shape[0] != out->rows) return false;
  out->residuals = data_of(more);
  return more.shape[1] == (out->width + 1) / 2;
}

// The table of an nn.Embedding that changes no rows as it looks them up.
bool read_float_table(PyObject* state, const py::object& parameters, Table* out) {
  dlpack::Tensor t;
  PyObject* weight = PyDict_GetItemWithError(parameters.ptr(), names.weight);
  if (!weight || PyDict_GetItemWithError(state, names.max_norm) != Py_None) return false;
  if (!view_parameter(weight, &t) || wants_gradient(weight)) return false;
  const DTypePair* dtype = find(t.dtype);
  if (!dtype || dtype->ours != DType::f32 || t.ndim != 2 || !is_contiguous(t)) return false;
  *out = {t.shape[0], t.shape[1], nullptr, nullptr};
  out->floats = reinterpret_cast<const float*>(data_of(t));
  return true;
}

// Indices of a tensor of int64 or int32, one after the other. False: one is out of range.
template <class Index>
bool read_indices(const dlpack::Tensor& t, int64_t count, int64_t table_rows, std::vector<int64_t>* out) {
  const auto* data = reinterpret_cast<const Index*>(data_of(t));
  const int64_t inner = t.ndim ? t.shape[t.ndim - 1] : 1, step = t.ndim ? t.strides[t.ndim - 1] : 0;
  for (int64_t outer = 0; outer < count / inner; ++outer) {
    int64_t at = 0, rest = outer;
    for (int dim = t.ndim - 2; dim >= 0; --dim) at += rest % t.shape[dim] * t.strides[dim], rest /= t.shape[dim];
    for (int64_t i = 0; i < inner; ++i) {
      const int64_t row = data[at + i * step];
      if (row < 0 || row >= table_rows) return false;
      out->push_back(row);
    }
  }
  return true;
}

// A tensor of this many values, one after the other, is broadcast to the sizes of a sum: which of them is where.
std::vector<int64_t> broadcast(const dlpack::Tensor& t, int64_t count, const Sum& sum) {
  std::vector<int64_t> places{0};
  for (int dim = 0, own = t.ndim - sum.ndim; dim < sum.ndim; ++dim, ++own) {
    const int64_t size = own < 0 ? 1 : t.shape[own], step = size == 1 ? 0 : count /= size;
    std::vector<int64_t> more;
    more.reserve(places.size() * sum.shape[dim]);
    for (const int64_t place : places)
      for (int64_t i = 0; i < sum.shape[dim]; ++i) more.push_back(place + i * step);
    places = std::move(more);
  }
  return places;
}

// Whether a tensor of indices can be broadcast to the sizes of a sum. count: how many it has.
bool fits(const dlpack::Tensor& t, const Sum& sum, int64_t* count) {
  const int missing = sum.ndim - t.ndim;
  if (missing < 0 || t.dtype.code != dlpack::kInt || t.dtype.lanes != 1 || t.dtype.bits < 32) return false;
  *count = 1;
  for (int dim = 0; dim < t.ndim; *count *= t.shape[dim++])
    if (t.shape[dim] != 1 && t.shape[dim] != sum.shape[missing + dim]) return false;
  return true;
}

// Adds a table to the terms. Where it has fewer indices than the sum, as positions do, each row is made once.
bool add_term(Table table, PyObject* indices, Sum* sum) {
  dlpack::Tensor t;
  int64_t count;
  std::vector<int64_t> rows;
  if (!view(indices, &t) || !fits(t, *sum, &count)) return false;
  rows.reserve(count);
  const auto read = t.dtype.bits == 64 ? read_indices<int64_t> : read_indices<int32_t>;
  if (!read(t, count, table.rows, &rows)) return false;
  if (count < sum->count && !table.floats) {
    std::vector<float> values(count * table.width);
    look_up(table, rows.data(), count, DType::f32, values.data());
    table = {count, table.width, nullptr, nullptr, nullptr, values.data()};
    sum->values.push_back(std::move(values));
    rows = broadcast(t, count, *sum);
  } else if (count < sum->count) {
    std::vector<int64_t> places = broadcast(t, count, *sum);
    for (int64_t& place : places) place = rows[place];
    rows = std::move(places);
  }
  sum->terms.push_back({table, rows.data()});
  sum->rows.push_back(std::move(rows));
  return table.width > 0 && table.width == sum->terms[0].table.width;
}

// One more term: (module, indices, what it has packed, residuals), of which an nn.Embedding has None for the last two.
bool read_term(PyObject* term, const Kinds& kinds, Sum* sum) {
  if (!PyTuple_Check(term) || PyTuple_GET_SIZE(term) != 4) return false;
  PyObject *module = PyTuple_GET_ITEM(term, 0), *packed = PyTuple_GET_ITEM(term, 2);
  Table table{};
  if (packed == Py_None) {
    PyObject* state = plain_state(module, kinds.float_table);
    py::object parameters = state ? held_parameters(state) : py::object();
    if (!parameters || !read_float_table(state, parameters, &table)) return false;
    sum->held.push_back(std::move(parameters));
  } else {
    PyObject* state = plain_state(module, kinds.int8_table);
    if (!state || !is_float32(state) || !read_table(packed, PyTuple_GET_ITEM(term, 3), &table)) return false;
  }
  return add_term(table, PyTuple_GET_ITEM(term, 1), sum);
}

bool read_sizes(PyObject* sizes, Sum* sum) {
  if (!PyTuple_Check(sizes) || PyTuple_GET_SIZE(sizes) >= kMostDims) return false;
  sum->ndim = static_cast<int>(PyTuple_GET_SIZE(sizes));
  for (int dim = 0; dim < sum->ndim; ++dim) {
    sum->shape[dim] = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes, dim));
    if (sum->shape[dim] < 1) return false;
    sum->count *= sum->shape[dim];
  }
  return true;
}

// The sum, normalized if there is a norm. Null: these are not plain calls.
py::object computed(PyObject* terms, PyObject* norm, PyObject* sizes, const Kinds& kinds) {
  Sum sum;
  NormRows rows{};
  if (!plain_eager() || !PyTuple_Check(terms) || !PyTuple_GET_SIZE(terms) || !read_sizes(sizes, &sum)) return {};
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(terms); ++i)
    if (!read_term(PyTuple_GET_ITEM(terms, i), kinds, &sum)) return {};
  const int64_t width = sum.terms[0].table.width;
  if (norm != Py_None) {
    PyObject* state = plain_state(norm, kinds.norm);
    py::object parameters = state ? held_parameters(state) : py::object();
    if (!parameters || !read_norm(state, parameters, width, &rows)) return {};
    sum.held.push_back(std::move(parameters));
  }
  void* data;
  sum.shape[sum.ndim] = width;
  auto y = py::reinterpret_steal<py::object>(new_output(sum.shape, sum.ndim + 1, width, *kF32, &data));
  if (!y) return {};
  auto* values = static_cast<float*>(data);
  rows.count = sum.count, rows.x = rows.y = values;
  {
    const Unlocked unlocked(sum.count * width >= kKeepGilBelowValues);
    const int added = static_cast<int>(sum.terms.size());
    look_up(active_kernel(), {sum.terms.data(), added, values, norm == Py_None ? nullptr : &rows}, sum.count);
  }
  return y;
}

PyObject* call_embedding_sum(PyObject*, PyObject* const* args, Py_ssize_t count) {
  return without_exceptions([=] {
    if (count != 4 || !PyTuple_Check(args[3]) || PyTuple_GET_SIZE(args[3]) != 3) Py_RETURN_NOTIMPLEMENTED;
    const Kinds kinds{PyTuple_GET_ITEM(args[3], 0), PyTuple_GET_ITEM(args[3], 1), PyTuple_GET_ITEM(args[3], 2)};
    return or_not_implemented(computed(args[0], args[1], args[2], kinds));
  });
}

PyMethodDef methods[] = {
    {"call_embedding_sum", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(call_embedding_sum)), METH_FASTCALL,
     "call_embedding_sum(((table, indices, packed, residual), ...), norm, sizes, (int8_table, float_table, "
     "norm_class)): "
     "norm(table(indices) + ...) of indices that are broadcast to these sizes, without the norm where it is None; or "
     "NotImplemented."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

void add_direct_embedding(py::module_& module) {
  names = {name("dtype"), name("weight"), name("max_norm")};
  PyModule_AddFunctions(module.ptr(), methods);
}

}  // namespace torchq
