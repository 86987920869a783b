// A problem on torch's threads: what the torch ops and the direct calls share.
#pragma once

#include "gemm/gemm.h"

namespace torchq {

// Computes problem.y with this kernel, on as many of torch's threads as the problem pays for.
void run(const Kernel& kernel, const Problem& problem);

}  // namespace torchq
