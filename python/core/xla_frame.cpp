// A handler's call as XLA's C structs tell it.
#include "xla_frame.h"

#include <memory>
#include <stdexcept>
#include <string>

#include "flashcore/error.h"

namespace flashcore::python::xla {

namespace {

template <class Request>
Request request(const Frame& frame) {
  Request r{};
  r.struct_size = sizeof(Request);
  r.context = frame.context;
  return r;
}

/// What an error of XLA's says; the error is gone then.
std::string take_words(const Frame& frame, Error* error) {
  GetDetails get{sizeof(GetDetails), nullptr, error, nullptr, Code::internal};
  frame.api->get_details(&get);
  std::string words = get.message ? get.message : "";
  DestroyError destroy{sizeof(DestroyError), nullptr, error};
  frame.api->destroy_error(&destroy);
  return words;
}

void check(const Frame& frame, Error* error, const char* what) {
  if (error) throw std::runtime_error(what + (": " + take_words(frame, error)));
}

/// What the library asks of a workspace. XLA aligns no less in truth, but promises only kPromised.
constexpr std::size_t kAlignment = 256;
constexpr std::size_t kPromised = 16;

}  // namespace

const void* AttributeReader::find(std::string_view name, AttributeKind kind) const {
  for (std::int64_t i = 0; i < attributes_.size; ++i)
    if (attributes_.kinds[i] == kind &&
        std::string_view(attributes_.names[i]->data, attributes_.names[i]->size) == name)
      return attributes_.values[i];
  return nullptr;
}

std::int64_t AttributeReader::integer(std::string_view name) const {
  const auto* scalar = static_cast<const Scalar*>(find(name, kScalar));
  if (!scalar || scalar->type != kS64) throw InvalidArgument("no 64-bit integer attribute " + std::string(name));
  return *static_cast<const std::int64_t*>(scalar->value);
}

std::optional<double> AttributeReader::number(std::string_view name) const {
  const auto* scalar = static_cast<const Scalar*>(find(name, kScalar));
  if (!scalar) return std::nullopt;
  if (scalar->type != kF64) throw InvalidArgument("attribute " + std::string(name) + " is not a 64-bit number");
  return *static_cast<const double*>(scalar->value);
}

std::string_view AttributeReader::text(std::string_view name) const {
  const auto* text = static_cast<const Text*>(find(name, kString));
  return text ? std::string_view(text->data, text->size) : std::string_view();
}

DType dtype_of(std::int32_t type, std::string_view name) {
  switch (type) {
    case kPred:
      return DType::boolean;
    case kS32:
      return DType::int32;
    case kS64:
      return DType::int64;
    case kF16:
      return DType::float16;
    case kF32:
      return DType::float32;
    case kF64:
      return DType::float64;
    case kBF16:
      return DType::bfloat16;
    case kF8E4M3FN:
      return DType::float8_e4m3;
    default:
      throw InvalidType(std::string(name) + " has XLA's element type " + std::to_string(type) +
                        ", which flashcore does not know");
  }
}

TakeScratch scratch_of(const Frame& frame) {
  return [&frame](std::size_t bytes) -> std::shared_ptr<void> {
    if (bytes == 0) return nullptr;
    auto allocate = request<AllocateMemory>(frame);
    allocate.bytes = bytes + kAlignment - kPromised;
    allocate.alignment = kPromised;
    if (Error* error = frame.api->allocate_memory(&allocate))
      throw OutOfMemory("no workspace of " + std::to_string(bytes) + " bytes from XLA: " + take_words(frame, error));
    const auto give_back = [&frame, given = allocate](void*) {
      auto free = request<FreeMemory>(frame);
      free.bytes = given.bytes;
      free.data = given.data;
      if (Error* error = frame.api->free_memory(&free)) take_words(frame, error);
    };
    void* aligned = allocate.data;
    std::size_t room = allocate.bytes;
    return {std::align(kAlignment, bytes, aligned, room), give_back};
  };
}

Stream stream_of(const Frame& frame) {
  auto get = request<GetStream>(frame);
  check(frame, frame.api->get_stream(&get), "XLA gives no stream for this call");
  return static_cast<Stream>(get.stream);
}

Device cuda_device_of(const Frame& frame) {
  auto get = request<GetDevice>(frame);
  check(frame, frame.api->get_device(&get), "XLA does not tell which GPU this call is for");
  return {DeviceType::cuda, get.ordinal};
}

Error* make_error(const Frame& frame, Code code, const char* message) noexcept {
  CreateError create{sizeof(CreateError), nullptr, message, code};
  return frame.api->create_error(&create);
}

bool answer_metadata(const Frame& frame) noexcept {
  for (Extension* extension = frame.extensions; extension; extension = extension->next) {
    if (extension->type != kMetadata) continue;
    Metadata& metadata = *reinterpret_cast<MetadataExtension*>(extension)->metadata;
    // XLA refuses versions newer than its own. What is used here has been there since 0.2, and XLA only appends to its
    // structs: so speak its version.
    metadata.version.major = 0;
    metadata.version.minor = frame.api ? frame.api->version.minor : 2;
    // Not for command buffers: the workspace is the call's, not the graph's, and would be gone when it is replayed.
    metadata.traits = 0;
    return true;
  }
  return false;
}

}  // namespace flashcore::python::xla
