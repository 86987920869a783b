// The block of mobile networks, an inverted residual: a depthwise convolution of floats between two pointwise ones,
// each of whose pixels has a range of its own. Either of these may be missing. What lies between them never leaves L2:
//
//   for each band of output rows
//     the codes of the pixels of x that no band before had
//     for each 16 channels
//       expand: their lanes, of those pixels; the band before has kept the others
//       depthwise
//     project: a product of the band's rows
//
// All bits are those of the three convolutions one after the other.
#pragma once

#include "conv.h"

namespace torchq {
namespace conv {

// Images with the channels last. The products are linear layers of rows, each with its own range, without gaps: x of
// `expand` are the pixels of the input, y of `project` those of the output.
struct Inverted {
  const torchq::Problem* expand;   // or null; its y is not read
  const Problem* depthwise;        // multiplies_floats(). Behind `expand` its x is not read, before `project` not its y
  const torchq::Problem* project;  // or null; its x is not read
};

// How it is computed. schedule() derives it once; every part reads it.
struct InvertedJob {
  Inverted of;
  torchq::Job expand, project;  // of the rows of a band
  Job depthwise;                // in bands of band_rows
  int parts;                    // ranges of output rows
  size_t scratch_bytes;
};

// Whether it can be computed so, and takes less time than one after the other.
bool pays(const Kernel& kernel, const Inverted& inverted, int threads);

// The problems must outlive the job.
InvertedJob schedule(const Kernel& kernel, const Inverted& inverted, int most_parts);

// Computes a part. scratch: job.scratch_bytes, which parts running at the same time must not share.
void run(const InvertedJob& job, int index, void* scratch);

}  // namespace conv
}  // namespace torchq
