// The exceptions that flashcore throws. The type tells at which station a call was refused.
#pragma once

#include <new>
#include <stdexcept>
#include <string>

#include "flashcore/export.h"

namespace flashcore {

/// The call can never be valid: a shape, a length or an option is wrong. Says what was given and what is allowed.
/// Nothing was written. Python: `ValueError`.
class FLASHCORE_API InvalidArgument : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

/// The call can never be valid because a tensor has the wrong dtype. Nothing was written. Python: `TypeError`.
class FLASHCORE_API InvalidType : public InvalidArgument {
 public:
  using InvalidArgument::InvalidArgument;
};

/// The call is valid, but no kernel of this build runs it on this device. Lists each kernel with its reason and the
/// nearest thing that works. Nothing was written. Python: `flashcore.Unsupported`.
class FLASHCORE_API Unsupported : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The CUDA runtime reported an error. `code()` is its `cudaError_t`. Python: `flashcore.CudaError`.
class FLASHCORE_API CudaError : public std::runtime_error {
 public:
  CudaError(int code, const std::string& what) : std::runtime_error(what), code_(code) {}
  int code() const noexcept { return code_; }

 private:
  int code_;
};

/// A memory resource could not give what was asked. The resource stays usable. Python: `MemoryError`.
class FLASHCORE_API OutOfMemory : public std::bad_alloc {
 public:
  explicit OutOfMemory(std::string what) : what_(std::move(what)) {}
  const char* what() const noexcept override { return what_.c_str(); }

 private:
  std::string what_;
};

}  // namespace flashcore
