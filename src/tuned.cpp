// Files of tuned kernels: how they are read, and the table of the one that is loaded.
#include "tuned.h"

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "flashcore/error.h"
#include "flashcore/tuning.h"

namespace flashcore {
namespace detail {
namespace {

constexpr std::string_view kFirstLine = "flashcore-tuned 1";

std::string_view trimmed(std::string_view text) {
  constexpr const char* kBlanks = " \t\r";
  const std::size_t begin = text.find_first_not_of(kBlanks);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kBlanks) - begin + 1);
}

/// What of a problem decides which kernel is tuned for it: all but the random numbers.
Problem without_seed(Problem problem) {
  problem.seed = 0;
  return problem;
}

struct ProblemHash {
  std::size_t operator()(const Problem& p) const {
    const Sizes& s = p.size;
    std::size_t hash = p.flags;
    for (const std::int64_t x : {s.batch, s.seqlen_q, s.seqlen_k, s.total_q, s.total_k, s.heads_q, s.heads_k,
                                 s.head_dim, static_cast<std::int64_t>(p.phase), static_cast<std::int64_t>(p.dtype)})
      hash = hash * 1000003 ^ std::hash<std::int64_t>()(x);
    return hash;
  }
};

class FileReader {
 public:
  explicit FileReader(const std::string& path) : path_(path), file_(path) {
    if (!file_) throw InvalidArgument(path + ": cannot be read: " + std::strerror(errno));
  }

  std::vector<TunedKernel> read() {
    for (std::string text; std::getline(file_, text);) {
      ++number_;
      const std::string_view line = trimmed(text);
      if (!line.empty() && line.front() != '#') read_line(line);
    }
    if (file_.bad() || !file_.eof()) throw InvalidArgument(path_ + ": cannot be read");
    if (!begun_) fail("the file is empty; it begins with \"" + std::string(kFirstLine) + "\"");
    return std::move(entries_);
  }

 private:
  [[noreturn]] void fail(const std::string& what) const {
    throw InvalidArgument(path_ + ":" + std::to_string(number_) + ": " + what);
  }

  void read_line(std::string_view line) {
    if (!begun_) {
      if (line != kFirstLine) fail("no file of tuned kernels: its first line is \"" + std::string(kFirstLine) + "\"");
      begun_ = true;
    } else if (line.front() == '[') {
      if (line.back() != ']' || line.size() < 3) fail("a device is [name]");
      device_name_ = line.substr(1, line.size() - 2);
    } else {
      read_entry(line);
    }
  }

  void read_entry(std::string_view line) {
    constexpr std::string_view kArrow = " -> ";
    const std::size_t arrow = line.find(kArrow);
    if (arrow == std::string_view::npos) fail("neither \"[device]\" nor \"problem line -> kernel\"");
    if (device_name_.empty()) fail("the name of a device in brackets has to stand before the first problem");
    std::string_view kernel = line.substr(arrow + kArrow.size());
    const std::size_t note = kernel.find(" #");
    TunedKernel entry{device_name_, {}, {}, {}};
    if (note != std::string_view::npos) entry.note = trimmed(kernel.substr(note + 2));
    entry.kernel = trimmed(kernel.substr(0, note));
    if (entry.kernel.empty() || entry.kernel.find_first_of(" \t") != std::string::npos)
      fail("one word is a kernel, \"" + entry.kernel + "\" given");
    try {
      entry.problem_line = to_line(without_seed(parse_problem(line.substr(0, arrow))));
    } catch (const InvalidArgument& error) {
      fail(error.what());
    }
    for (const TunedKernel& other : entries_)
      if (other.device_name == entry.device_name && other.problem_line == entry.problem_line)
        fail("\"" + entry.problem_line + "\" is there twice");
    entries_.push_back(std::move(entry));
  }

  const std::string& path_;
  std::ifstream file_;
  int number_ = 0;
  bool begun_ = false;
  std::string device_name_;
  std::vector<TunedKernel> entries_;
};

/// A file that was read. Never changes.
struct Table {
  using Kernels = std::unordered_map<Problem, std::string, ProblemHash>;

  Table() = default;
  explicit Table(const std::string& file) : path(file) {
    for (const TunedKernel& entry : FileReader(file).read())
      devices[entry.device_name].emplace(parse_problem(entry.problem_line), entry.kernel);
  }

  std::string path;
  std::unordered_map<std::string, Kernels> devices;
};

const Table unread;                                   // nobody looked at FLASHCORE_TUNED yet
constinit std::atomic<const Table*> loaded{&unread};  // null: no file
std::mutex loading;

/// With `loading` locked. Calls may still read the tables before this one.
const Table* put(std::unique_ptr<const Table> table) {
  static auto* const kept = new std::vector<std::unique_ptr<const Table>>;  // never destroyed: calls at exit may ask
  const Table* const now = table.get();
  if (table) kept->push_back(std::move(table));
  loaded.store(now, std::memory_order_release);
  return now;
}

const Table* read_variable() {
  const std::lock_guard lock(loading);
  const Table* const now = loaded.load(std::memory_order_relaxed);
  if (now != &unread) return now;
  const char* path = std::getenv("FLASHCORE_TUNED");
  if (!path || !*path) return put(nullptr);
  try {
    return put(std::make_unique<const Table>(path));
  } catch (const InvalidArgument& error) {
    throw InvalidArgument(std::string("FLASHCORE_TUNED: ") + error.what());
  }
}

}  // namespace

Tuned find_tuned(const Problem& problem, const std::string& device_name) {
  const Table* table = loaded.load(std::memory_order_acquire);
  if (table == &unread) table = read_variable();
  if (!table) return {};
  const auto device = table->devices.find(device_name);
  if (device == table->devices.end()) return {};
  const auto kernel = device->second.find(without_seed(problem));
  if (kernel == device->second.end()) return {};
  return {&kernel->second, &table->path};
}

}  // namespace detail

std::vector<TunedKernel> read_tuned(const std::string& path) { return detail::FileReader(path).read(); }

void load_tuned(const std::string& path) {
  auto table = std::make_unique<const detail::Table>(path);
  const std::lock_guard lock(detail::loading);
  detail::put(std::move(table));
}

void forget_tuned() noexcept {
  const std::lock_guard lock(detail::loading);
  detail::put(nullptr);
}

}  // namespace flashcore
