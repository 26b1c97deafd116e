// Stands in for table.cpp in builds for other architectures: no rows.
#include "sm90.h"

namespace flashcore::sm90 {

detail::KernelTable table() { return {}; }

}  // namespace flashcore::sm90
