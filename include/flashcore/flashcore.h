// Everything flashcore offers to C++.
#pragma once

#include "flashcore/attention.h"
#include "flashcore/device.h"
#include "flashcore/error.h"
#include "flashcore/memory.h"
#include "flashcore/primitives.h"
#include "flashcore/stopwatch.h"
#include "flashcore/tensor.h"
#include "flashcore/threads.h"
#include "flashcore/tuning.h"
