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

// Output pixels whose patches lie at equal distances.
struct Line {
  int64_t count;
  int64_t outer, middle, inner;  // where the first patch lies in the padded input
  int axis;                      // along which the next ones follow, the axis' stride apart
};

// The line that begins with `pixel`, up to `end`: along the inner axis, or where that has one output along the outer
// one.
Line line_of(const Geometry& geometry, int64_t pixel, int64_t end);

// Where the first code of an output pixel's patch lies, counted from the start of a band that begins at `first_outer`.
int64_t patch_at(const Job& job, int64_t pixel, int64_t first_outer, int64_t group);

// Fills rows with the patches of these pixels.
void load_patches(const Job& job, const uint8_t* image, int64_t first_outer, int64_t group, int64_t pixel,
                  int64_t count, const Scratch& s);

}  // namespace conv
}  // namespace torchq
