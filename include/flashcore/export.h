// Symbol visibility of the public interface.
#pragma once

#ifdef __GNUC__
#define FLASHCORE_API __attribute__((visibility("default")))
#else
#define FLASHCORE_API
#endif
