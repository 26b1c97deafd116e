// Symbol visibility of the public interface.
#pragma once

#if defined(FLASHCORE_STATIC) || !defined(__GNUC__)
#define FLASHCORE_API
#else
#define FLASHCORE_API __attribute__((visibility("default")))
#endif
