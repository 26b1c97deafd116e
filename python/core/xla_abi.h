// The C interface through which XLA calls functions from outside ("typed FFI"), as far as it is used here.
//
// The layout is that of XLA's public xla/ffi/api/c_api.h, API versions 0.2 to 0.4, in this project's own words: so no
// JAX is needed to build, and one binary serves every JAX that speaks API 0. XLA only ever appends to these structs.
#pragma once

#include <cstddef>
#include <cstdint>

namespace flashcore::python::xla {

struct Api;
struct Context;  // of one execution; opaque
struct Error;    // opaque; owned by who receives it

enum ExtensionType : std::int32_t { kMetadata = 1 };

struct Extension {
  std::size_t struct_size;
  std::int32_t type;
  Extension* next;
};

struct Version {
  std::size_t struct_size;
  Extension* extensions;
  std::int32_t major;
  std::int32_t minor;
};

/// What XLA asks of a handler before it is ever run.
struct Metadata {
  std::size_t struct_size;
  Version version;
  std::uint32_t traits;  // bit 0: may be captured into a command buffer, and the capture replayed
};

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

/// The numbers of xla::PrimitiveType.
enum Type : std::int32_t {
  kPred = 1,
  kS32 = 4,
  kS64 = 5,
  kF16 = 10,
  kF32 = 11,
  kF64 = 12,
  kBF16 = 16,
  kF8E4M3FN = 20,
};

/// A dense array; the last dimension is contiguous.
struct Buffer {
  std::size_t struct_size;
  Extension* extensions;
  std::int32_t type;
  void* data;
  std::int64_t rank;
  std::int64_t* dims;
};

/// Operands or results: arrays behind untyped pointers. `kinds` holds 1, the only kind there is.
struct Buffers {
  std::size_t struct_size;
  Extension* extensions;
  std::int64_t size;
  std::int32_t* kinds;
  void** items;
};

struct Text {
  const char* data;
  std::size_t size;
};

struct Scalar {
  std::int32_t type;
  void* value;
};

enum AttributeKind : std::int32_t { kArray = 1, kDictionary = 2, kScalar = 3, kString = 4 };

/// Sorted by name. A value is a Scalar or a Text, by its kind.
struct Attributes {
  std::size_t struct_size;
  Extension* extensions;
  std::int64_t size;
  std::int32_t* kinds;
  Text** names;
  void** values;
};

enum Stage : std::int32_t { kInstantiate = 0, kPrepare = 1, kInitialize = 2, kExecute = 3 };

/// Everything about one call of a handler.
struct Frame {
  std::size_t struct_size;
  Extension* extensions;
  const Api* api;
  Context* context;
  std::int32_t stage;
  Buffers operands;
  Buffers results;
  Attributes attributes;
};

using Handler = Error*(Frame*);

enum class Code : std::int32_t { invalid_argument = 3, resource_exhausted = 8, unimplemented = 12, internal = 13 };

struct CreateError {
  std::size_t struct_size;
  Extension* extensions;
  const char* message;
  Code code;
};

/// Up to API 0.3 without the code: XLA then takes no notice of what follows the message.
struct GetDetails {
  std::size_t struct_size;
  Extension* extensions;
  Error* error;
  const char* message;  // out; lives as long as the error
  Code code;            // out
};

struct DestroyError {
  std::size_t struct_size;
  Extension* extensions;
  Error* error;
};

struct GetStream {
  std::size_t struct_size;
  Extension* extensions;
  Context* context;
  void* stream;  // out
};

struct AllocateMemory {
  std::size_t struct_size;
  Extension* extensions;
  Context* context;
  std::size_t bytes;
  std::size_t alignment;
  void* data;  // out
};

struct FreeMemory {
  std::size_t struct_size;
  Extension* extensions;
  Context* context;
  std::size_t bytes;
  void* data;
};

struct GetDevice {
  std::size_t struct_size;
  Extension* extensions;
  Context* context;
  std::int32_t ordinal;  // out
};

/// XLA's own functions, in their order; those that are not used here are only places.
struct Api {
  using Unused = void (*)();

  std::size_t struct_size;
  Extension* extensions;
  Version version;
  const void* internal;
  Error* (*create_error)(CreateError*);
  void (*get_details)(GetDetails*);
  void (*destroy_error)(DestroyError*);
  Unused register_handler;
  Error* (*get_stream)(GetStream*);
  Unused type_and_state[4];  // register a type, get from the context, set and get state
  Error* (*allocate_memory)(AllocateMemory*);
  Error* (*free_memory)(FreeMemory*);
  Unused threads_and_futures[6];  // schedule, count threads; create, set and fail a future; run id
  Error* (*get_device)(GetDevice*);
};

static_assert(sizeof(Buffer) == 48 && sizeof(Buffers) == 40 && sizeof(Attributes) == 48 && sizeof(Frame) == 168);
static_assert(sizeof(Version) == 24 && sizeof(Metadata) == 40 && offsetof(Api, get_device) == 184);

}  // namespace flashcore::python::xla
