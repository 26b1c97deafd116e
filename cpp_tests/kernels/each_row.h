// The rows of all devices, as parameters of tests.
#pragma once

#include <gtest/gtest.h>

#include <cctype>
#include <ostream>
#include <string>
#include <vector>

#include "../support/test_device.h"
#include "kernels/kernel.h"
#include "registry.h"

namespace flashcore::testing {

struct Row {
  const detail::Kernel* row;
  Device device;
};

inline std::ostream& operator<<(std::ostream& os, const Row& r) { return os << r.row->name; }

/// The rows that know one of the phases (bits).
inline std::vector<Row> rows_of(unsigned phases) {
  std::vector<Row> rows;
  for (const Device device : test_devices())
    for (const detail::Kernel* row : detail::kernels_of(device.type))
      if (row->phases & phases) rows.push_back({row, device});
  return rows;
}

/// The row by itself, and on a GPU with each of its settings. (The CPU's have tests of their own.)
inline std::vector<std::string> words_of(const detail::Kernel& row, const detail::Problem& problem, Device device) {
  if (device.type == DeviceType::cpu) return {row.name};
  return detail::kernel_words(row, problem, device_info(device));
}

inline std::string as_test_name(std::string text) {
  for (char& c : text)
    if (!std::isalnum(static_cast<unsigned char>(c))) c = '_';
  return text;
}

inline std::string name_of_row(const ::testing::TestParamInfo<Row>& info) {
  return as_test_name(info.param.row->name) + "_" + std::to_string(info.index);
}

}  // namespace flashcore::testing
