// What the op and the direct call of attention make of their arguments alike.
#pragma once

#include <cmath>
#include <cstdint>

#include "attention/attention.h"

namespace torchq::attention {

constexpr int64_t kFar = int64_t{1} << 62;  // further than any key

// Which keys are seen within `reach` of a row, the first of which stands at position `offset` among them.
inline Band band_of(bool is_causal, int64_t offset, int64_t reach) {
  return {offset - reach, is_causal ? offset : offset + reach};
}

inline float default_scale(int64_t depth) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(depth))); }

}  // namespace torchq::attention
