// Patches of an image -> rows of codes for the GEMM.
#pragma once

#include "conv.h"
#include "scratch.h"

namespace torchq {
namespace conv {

// The runs of a patch, as few as there can be.
Runs runs_of(const Job& job);

// Whether patches are rows as they lie: one run each, at equal distances. Fills row_stride with the distance.
bool rows_lie_in_image(const Job& job, int64_t& row_stride);

// Where the first code of an output pixel's patch lies, counted from the start of a band that begins at `first_outer`.
int64_t patch_at(const Job& job, int64_t pixel, int64_t first_outer, int64_t group);

// Fills rows with the patches of these pixels.
void load_patches(const Job& job, const uint8_t* image, int64_t first_outer, int64_t group, int64_t pixel,
                  int64_t count, const Scratch& s);

}  // namespace conv
}  // namespace torchq
