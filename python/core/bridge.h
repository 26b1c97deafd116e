// Bridge: how the arrays of one framework become TensorViews. Reader: does it for the arguments of one call.
#pragma once

#include <nanobind/nanobind.h>

#include <optional>
#include <string>
#include <vector>

#include "dl_abi.h"
#include "flashcore/tensor.h"

namespace flashcore::python {

namespace nb = nanobind;

/// What interop.py knows of a framework, in the form that the hot path needs.
struct Bridge {
  nb::object type;            // every array of a call is an instance of it
  nb::object keywords;        // dict: given to `__dlpack__`
  nb::object reinterpret;     // for an array that refuses `__dlpack__`: -> (array, dtype name or "")
  nb::object current_stream;  // device index -> the framework's current stream, or None
  nb::object empty;           // (array, sizes…, dtype=…, stream=…) -> a new dense array where that array is
  nb::object dtypes;          // dict: what that takes for a dtype, by name, and it takes no stream; or None: the names
  nb::object empty_like;      // its short cut for an array just like that one, which is dense; or None
  nb::object inspect;         // told of an array that is negated or wants a gradient; may refuse it; or None
  nb::object is_negated;      // array -> whether its values are the negatives of its bits, or None
  nb::object keyword_names = {};  // `keywords` as vector calls take them: a tuple of names, then the values
  std::vector<nb::object> keyword_values = {};
  const dl::ExchangeApi* api = nullptr;  // the C table, instead of `__dlpack__`
  bool ordered = false;                  // `__dlpack__(stream=…)` is to order the framework's work before ours
  bool immutable = false;                // results cannot be written into arrays of this framework
  bool wary_of_grad = false;             // `inspect` still wants to hear of arrays that want a gradient
};

/// The exchange table of a type, or null where it has none that can lend tensors.
const dl::ExchangeApi* exchange_api(nb::handle type);

/// function(array), by the shortest way. Throws python_error.
nb::object ask(nb::handle function, nb::handle array);

enum class Access { read, write, fresh };  // fresh: no values in it yet, or none that matter

/// Whether arrays that want a gradient are pointed out to the framework.
enum class Grads { ignored, mentioned };

/// Turns Python arrays into views and keeps alive what owns them, until it goes out of scope (with the GIL held).
class Reader {
 public:
  /// `stream` is None or an int.
  Reader(const Bridge& bridge, nb::handle stream, Grads grads = Grads::ignored);

  /// None gives the empty view. `name` is the argument's name, for messages.
  TensorView read(nb::handle array, const char* name, Access access = Access::read);

  /// The stream to run on, for work on `device`.
  Stream stream(Device device) const;

  const Bridge& bridge() const { return bridge_; }
  nb::handle given_stream() const { return stream_; }

 private:
  void inspect(nb::handle array, Access access) const;
  TensorView read_foreign(nb::handle array, const char* name, Access access);
  std::optional<TensorView> try_export(nb::handle array, const char* name, Access access, const std::string& meant);
  TensorView read_capsule(nb::object capsule, const char* name, Access access, const std::string& meant);
  nb::object call_dlpack(nb::handle array) const;
  void keep(nb::object owner);

  const Bridge& bridge_;
  nb::handle stream_;
  Grads grads_;
  std::vector<nb::object> owners_;
};

void bind_bridge(nb::module_& m);

}  // namespace flashcore::python
