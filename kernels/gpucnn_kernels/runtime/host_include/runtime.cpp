// The runtime that is linked into every module: see gpucnn_host_runtime.h.
#define GPUCNN_HOST_SANITIZE 1  // compiled once, for sanitized and plain modules alike; itself never instrumented

#include "gpucnn_host_runtime.h"

#include "runtime_fibers.h"
#include "runtime_schedule.h"
#include "runtime_memory.h"
#include "runtime_races.h"
#include "runtime_global_races.h"
#include "runtime_ptx.h"
#include "runtime_warpgroup.h"
#include "runtime_sanitizer.h"
#include "runtime_launch.h"
