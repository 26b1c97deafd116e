// Looking into lengths and page tables, before a kernel trusts them.
#include "length_checks.h"

#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "backend.h"
#include "flashcore/error.h"

namespace flashcore::detail {
namespace {

using Values = std::vector<std::int32_t>;

bool asked_to_check() {
  const char* wish = std::getenv("FLASHCORE_CHECK");
  return wish && std::string_view(wish) == "1";
}

Values values_of(const std::int32_t* data, std::int64_t count, Device device, Stream stream) {
  if (!data || count <= 0) return {};
  if (device.type == DeviceType::cpu) return Values(data, data + count);
  Values host(static_cast<std::size_t>(count));
  backend_of(device).copy_to_host(host.data(), data, host.size() * sizeof(std::int32_t), device.index, stream);
  return host;
}

std::string element(const char* name, std::int64_t index, std::int64_t value) {
  return std::string(name) + "[" + std::to_string(index) + "] is " + std::to_string(value);
}

void check_offsets(const Values& v, const char* name, std::int64_t total, std::int64_t longest) {
  if (v.empty()) return;
  if (v[0] != 0) throw InvalidArgument(element(name, 0, v[0]) + "; it must start with 0");
  for (std::size_t i = 1; i < v.size(); ++i) {
    const auto at = static_cast<std::int64_t>(i);
    if (v[i] < v[i - 1])
      throw InvalidArgument(element(name, at, v[i]) + " after " + std::to_string(v[i - 1]) + "; it must never fall");
    if (v[i] - v[i - 1] > longest)
      throw InvalidArgument("sequence " + std::to_string(at - 1) + " of " + name + " has " +
                            std::to_string(v[i] - v[i - 1]) + " rows, more than the given maximum of " +
                            std::to_string(longest));
  }
  if (v.back() > total)
    throw InvalidArgument(element(name, static_cast<std::int64_t>(v.size()) - 1, v.back()) + ", but there are only " +
                          std::to_string(total) + " packed rows");
}

void check_pages(const Params& p, const Values& lengths, Device device, Stream stream) {
  const std::int64_t batch = p.size.batch;
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t keys = lengths[static_cast<std::size_t>(b)] + p.sequence.seqlen_new;
    const std::int64_t needed = (keys + p.page.page_size - 1) / p.page.page_size;
    const Values row = values_of(p.page.block_table + b * p.page.table_batch, needed, device, stream);
    for (std::size_t i = 0; i < row.size(); ++i)
      if (row[i] < 0 || row[i] >= p.page.pages)
        throw InvalidArgument("block_table[" + std::to_string(b) + "][" + std::to_string(i) + "] is " +
                              std::to_string(row[i]) + ", but the cache has pages 0 to " +
                              std::to_string(p.page.pages - 1));
  }
}

void check_cache(const Params& p, Device device, Stream stream) {
  const Values lengths = values_of(p.sequence.seqused_k, p.size.batch, device, stream);
  for (std::size_t b = 0; b < lengths.size(); ++b) {
    const auto at = static_cast<std::int64_t>(b);
    const std::int64_t keys = lengths[b] + p.sequence.seqlen_new;
    if (lengths[b] < 0) throw InvalidArgument(element("cache_seqlens", at, lengths[b]) + "; it must be at least 0");
    if (keys > p.size.seqlen_k)
      throw InvalidArgument(
          element("cache_seqlens", at, lengths[b]) +
          (p.sequence.seqlen_new ? " and " + std::to_string(p.sequence.seqlen_new) + " keys are new" : std::string()) +
          ", but the cache holds " + std::to_string(p.size.seqlen_k) + " keys a sequence");
    if (p.rotary.dim > 0 && keys > p.rotary.positions)
      throw InvalidArgument("rotary_cos and rotary_sin hold " + std::to_string(p.rotary.positions) +
                            " positions, but sequence " + std::to_string(at) + " has " + std::to_string(keys));
  }
  if (p.page.block_table) check_pages(p, lengths, device, stream);
}

void check_used(const Params& p, const Values& offsets, Device device, Stream stream) {
  const Values used = values_of(p.sequence.seqused_k, p.size.batch, device, stream);
  for (std::size_t b = 0; b < used.size(); ++b) {
    const std::int64_t longest = offsets.empty() ? p.size.seqlen_k : offsets[b + 1] - offsets[b];
    if (used[b] < 0 || used[b] > longest)
      throw InvalidArgument(element("seqused_k", static_cast<std::int64_t>(b), used[b]) + "; the sequence has 0 to " +
                            std::to_string(longest) + " keys");
  }
}

}  // namespace

void check_lengths(const Problem& problem, const Params& p, Device device, Stream stream) {
  const SequenceParams& s = p.sequence;
  if (!s.cu_seqlens_q && !s.seqused_k) return;
  if (device.type != DeviceType::cpu && !asked_to_check()) return;
  if (problem.phase == Phase::decode) return check_cache(p, device, stream);
  check_offsets(values_of(s.cu_seqlens_q, p.size.batch + 1, device, stream), "cu_seqlens_q", p.size.total_q,
                p.size.seqlen_q);
  const Values keys = s.cu_seqlens_k ? values_of(s.cu_seqlens_k, p.size.batch + 1, device, stream) : Values();
  check_offsets(keys, "cu_seqlens_k", p.size.total_k, p.size.seqlen_k);
  check_used(p, keys, device, stream);
}

}  // namespace flashcore::detail
