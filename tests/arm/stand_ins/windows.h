// A stand-in for Windows' header: dispatch_test.cpp answers.
#pragma once

#define PF_ARM_V82_DP_INSTRUCTIONS_AVAILABLE 43

extern "C" int IsProcessorFeaturePresent(unsigned feature);
