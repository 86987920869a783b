// A stand-in for macOS's header: dispatch_test.cpp answers.
#pragma once

#include <stddef.h>

extern "C" int sysctlbyname(const char* name, void* old, size_t* old_size, void* value, size_t size);
