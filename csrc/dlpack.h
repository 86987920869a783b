// DLPack's exchange table, as far as this project uses it. The DLPack specification 1.3 fixes its memory layout
// (https://dmlc.github.io/dlpack/latest/), and every table of the same major version has these fields in these places.
// It is declared here because torch's copy of the header may not be included together with the stable ABI.
#pragma once

#include <cstdint>

namespace torchq::dlpack {

constexpr uint32_t kMajorVersion = 1;
constexpr int32_t kCpu = 1;
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Device {
  int32_t type, id;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;      // in elements
  uint64_t byte_offset;  // from data to the first element
};

struct Version {
  uint32_t major, minor;
};

struct ManagedTensor {
  Version version;
  void* context;
  void (*deleter)(ManagedTensor*);
  uint64_t flags;
  Tensor tensor;
};

// What a framework publishes as type(tensor).__dlpack_c_exchange_api__, a capsule named "dlpack_exchange_api". Each
// function returns 0, or reports an error and returns -1. Those that take or give Python objects need the GIL.
struct Exchange {
  using ReportError = void (*)(void* context, const char* kind, const char* message);

  Version version;
  Exchange* older;
  // A new tensor with the dtype, device and shape of the prototype. Its memory is not initialized.
  int (*allocate)(Tensor* prototype, ManagedTensor** out, void* context, ReportError);
  int (*export_tensor)(void* object, ManagedTensor** out);
  int (*import_tensor)(ManagedTensor* stolen, void** object);
  // A view of the object, valid until the object changes or dies. Null if the framework has no such function.
  int (*view)(void* object, Tensor* out);
  int (*current_stream)(int32_t device_type, int32_t device_id, void** out);
};

}  // namespace torchq::dlpack
