// Reading what XLA hands to a handler, and answering in its terms.
#pragma once

#include <optional>
#include <string_view>

#include "flashcore/tensor.h"
#include "named_call.h"
#include "xla_abi.h"

namespace flashcore::python::xla {

/// The attributes of a call, by name. Throws InvalidArgument for one that is missing or of another type.
class AttributeReader {
 public:
  explicit AttributeReader(const Attributes& attributes) : attributes_(attributes) {}

  std::int64_t integer(std::string_view name) const;
  std::optional<double> number(std::string_view name) const;  ///< nothing where it is not given
  std::string_view text(std::string_view name) const;

 private:
  const void* find(std::string_view name, AttributeKind kind) const;

  const Attributes& attributes_;
};

/// XLA's number for a dtype as the library's. Throws InvalidType.
DType dtype_of(std::int32_t type, std::string_view name);

/// Scratch memory of XLA's own allocator, for work on the stream of this call. It goes back before the work is done,
/// as stream-ordered memory may.
TakeScratch scratch_of(const Frame& frame);

Stream stream_of(const Frame& frame);
Device cuda_device_of(const Frame& frame);

Error* make_error(const Frame& frame, Code code, const char* message) noexcept;

/// Answers XLA's question about the handler, if this call is one.
bool answer_metadata(const Frame& frame) noexcept;

}  // namespace flashcore::python::xla
