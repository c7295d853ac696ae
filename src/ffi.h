// What every handler shares: aliases, error text, decoding of types, checks of operands.

#ifndef JAX_ROUTER_FFI_H_
#define JAX_ROUTER_FFI_H_

#include <cstdint>
#include <string>
#include <utility>

#include "options.h"
#include "xla/ffi/api/ffi.h"

namespace jax_router {

namespace ffi = xla::ffi;

inline ffi::Error invalid(std::string message) {
  return ffi::Error::InvalidArgument("jax_router: " + std::move(message));
}

// Evaluates an expression of type ffi::Error and returns it from the caller if it failed.
#define JAX_ROUTER_RETURN_IF_ERROR(expression)     \
  do {                                             \
    ::jax_router::ffi::Error error = (expression); \
    if (error.failure()) return error;             \
  } while (false)

inline ffi::Error check_elements(const char* name, const ffi::AnyBuffer& buffer, int64_t expected) {
  const int64_t elements = static_cast<int64_t>(buffer.element_count());
  if (elements == expected) return ffi::Error::Success();
  return invalid(std::string(name) + " must have " + std::to_string(expected) + " elements, got " +
                 std::to_string(elements));
}

inline ffi::Error check_type(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type) {
  if (buffer.element_type() == type) return ffi::Error::Success();
  return invalid(std::string(name) + " has an element type that its kernel does not take");
}

inline ffi::Error decode_logits_type(const ffi::AnyBuffer& buffer, LogitsType* type) {
  switch (buffer.element_type()) {
    case ffi::DataType::F32:
      *type = LogitsType::kFloat32;
      return ffi::Error::Success();
    case ffi::DataType::BF16:
      *type = LogitsType::kBfloat16;
      return ffi::Error::Success();
    case ffi::DataType::F16:
      *type = LogitsType::kFloat16;
      return ffi::Error::Success();
    default:
      return invalid("logits must be float32, bfloat16 or float16");
  }
}

// Bytes of an index. Indices are never negative, so the sign of the type does not matter.
inline ffi::Error decode_index_bytes(const ffi::AnyBuffer& buffer, int* bytes) {
  switch (buffer.element_type()) {
    case ffi::DataType::S8:
    case ffi::DataType::U8:
      *bytes = 1;
      return ffi::Error::Success();
    case ffi::DataType::S16:
    case ffi::DataType::U16:
      *bytes = 2;
      return ffi::Error::Success();
    case ffi::DataType::S32:
    case ffi::DataType::U32:
      *bytes = 4;
      return ffi::Error::Success();
    case ffi::DataType::S64:
    case ffi::DataType::U64:
      *bytes = 8;
      return ffi::Error::Success();
    default:
      return invalid("experts must have an integer type");
  }
}

// Size of the last dimension; the caller has checked that there is one.
inline int64_t last_dimension(const ffi::AnyBuffer& buffer) { return buffer.dimensions().back(); }

}  // namespace jax_router

#endif  // JAX_ROUTER_FFI_H_
