# Finds a CUDA compiler, enables the language, and defines flashcore_add_kernels(). Sets FLASHCORE_HAVE_CUDA.
set(FLASHCORE_HAVE_CUDA OFF)
if(NOT FLASHCORE_CUDA MATCHES "^(ON|OFF|AUTO)$")
  message(FATAL_ERROR "flashcore: FLASHCORE_CUDA=${FLASHCORE_CUDA} given; ON, OFF or AUTO is allowed")
endif()

# NVIDIA's PyPI wheels hold a whole toolkit (site-packages/nvidia/cu13), but without lib64/ and without the unversioned
# names of the shared libraries, so that nvcc cannot link with it. A tree of links in the build folder adds both; nvcc
# takes its root from the folder of the link it was called by. Made anew at each configure: an isolated build's
# site-packages move.
function(_flashcore_link_wheel_toolkit result)
  set(${result} "" PARENT_SCOPE)
  find_package(Python 3.10 COMPONENTS Interpreter QUIET)
  if(NOT Python_Interpreter_FOUND)
    return()
  endif()
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "import nvidia.cu13 as toolkit; print(list(toolkit.__path__)[0])"
    OUTPUT_VARIABLE wheels OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(NOT EXISTS "${wheels}/bin/nvcc")
    return()
  endif()

  set(root "${CMAKE_CURRENT_BINARY_DIR}/cuda-toolkit")
  file(REMOVE_RECURSE "${root}")
  file(MAKE_DIRECTORY "${root}/bin" "${root}/lib")
  file(GLOB programs RELATIVE "${wheels}/bin" "${wheels}/bin/*")
  foreach(name IN LISTS programs)
    file(CREATE_LINK "${wheels}/bin/${name}" "${root}/bin/${name}" SYMBOLIC)
  endforeach()
  file(GLOB libraries RELATIVE "${wheels}/lib" "${wheels}/lib/*")
  foreach(name IN LISTS libraries)
    file(CREATE_LINK "${wheels}/lib/${name}" "${root}/lib/${name}" SYMBOLIC)
    string(REGEX REPLACE "\\.so\\..*$" ".so" unversioned "${name}")
    if(NOT EXISTS "${root}/lib/${unversioned}")
      file(CREATE_LINK "${name}" "${root}/lib/${unversioned}" SYMBOLIC)
    endif()
  endforeach()
  file(CREATE_LINK lib "${root}/lib64" SYMBOLIC)
  file(CREATE_LINK "${wheels}/include" "${root}/include" SYMBOLIC)
  file(CREATE_LINK "${wheels}/nvvm" "${root}/nvvm" SYMBOLIC)
  set(${result} "${root}" PARENT_SCOPE)
endfunction()

# CUDACXX and CMAKE_CUDA_COMPILER are the user's own words; then PATH, CUDA_PATH, CUDA_HOME, /usr/local/cuda, wheels.
# FLASHCORE_NVCC=wheels in the environment asks for the wheels.
macro(_flashcore_find_nvcc)
  set(_nvcc "${CMAKE_CUDA_COMPILER}")
  if(NOT _nvcc)
    set(_nvcc "$ENV{CUDACXX}")
  endif()
  if(NOT _nvcc AND NOT "$ENV{FLASHCORE_NVCC}" STREQUAL "wheels")
    find_program(_nvcc_found nvcc PATHS ENV CUDA_PATH ENV CUDA_HOME /usr/local/cuda PATH_SUFFIXES bin NO_CACHE)
    if(_nvcc_found)
      set(_nvcc "${_nvcc_found}")
    endif()
  endif()
  set(_linked_nvcc "${CMAKE_CURRENT_BINARY_DIR}/cuda-toolkit/bin/nvcc")
  if(NOT _nvcc OR _nvcc STREQUAL _linked_nvcc)
    _flashcore_link_wheel_toolkit(_toolkit)
    if(_toolkit)
      set(_nvcc "${_toolkit}/bin/nvcc")
      set(CUDAToolkit_ROOT "${_toolkit}")
    endif()
  endif()
endmacro()

if(NOT FLASHCORE_CUDA STREQUAL "OFF")
  _flashcore_find_nvcc()
  if(_nvcc)
    set(FLASHCORE_HAVE_CUDA ON)
  elseif(FLASHCORE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "flashcore: FLASHCORE_CUDA=ON, but no CUDA compiler found. Set CUDACXX or CUDA_PATH, or install "
      "NVIDIA's wheels, all of one version: pip install "
      "nvidia-cuda-nvcc==13.0.* nvidia-nvvm==13.0.* nvidia-cuda-crt==13.0.* nvidia-cuda-runtime==13.0.* "
      "nvidia-cuda-cccl==13.0.*")
  else()
    message(STATUS "flashcore: no CUDA compiler found, building CPU rows only")
  endif()
endif()
if(NOT FLASHCORE_HAVE_CUDA)
  return()
endif()

# ---- the toolkit --------------------------------------------------------------------------------------------------
if(NOT CMAKE_CUDA_COMPILER)
  set(CMAKE_CUDA_COMPILER "${_nvcc}" CACHE FILEPATH "CUDA compiler")
endif()
enable_language(CUDA)
find_package(CUDAToolkit 12.5 REQUIRED)

# Machine code for 8.0 also runs on 8.6 and 8.9; its PTX serves every newer chip.
set(FLASHCORE_PORTABLE_ARCHS 75-real 80 90-real)
if(FLASHCORE_ARCHS)
  set(FLASHCORE_PORTABLE_ARCHS ${FLASHCORE_ARCHS})
endif()
set(FLASHCORE_BUILD_SM90 ON)  # 9.0a machine code: what Hopper alone has
if(FLASHCORE_ARCHS AND NOT FLASHCORE_ARCHS MATCHES "90|native|all")
  set(FLASHCORE_BUILD_SM90 OFF)
endif()
message(STATUS "flashcore: CUDA ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${FLASHCORE_PORTABLE_ARCHS}")

# The driver is reached through the static runtime, never linked: the library loads where there is none.
target_link_libraries(flashcore PRIVATE CUDA::cudart_static)
set_source_files_properties(src/registry.cpp PROPERTIES COMPILE_DEFINITIONS FLASHCORE_HAVE_CUDA)

# ---- kernel flags, in one place -----------------------------------------------------------------------------------
# No fast-math. No -lineinfo: it makes the kernels 1.8 times as large; a profile gets it by CMAKE_CUDA_FLAGS.
add_library(flashcore_kernel_flags INTERFACE)
target_compile_options(flashcore_kernel_flags INTERFACE
  -Xcompiler=-Wall,-Wextra
  -Xptxas=--warn-on-spills,--warn-on-local-memory-usage
  $<$<BOOL:${FLASHCORE_WERROR}>:-Werror=all-warnings>)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
  target_compile_options(flashcore_kernel_flags INTERFACE --compress-mode=size)
else()
  target_compile_options(flashcore_kernel_flags INTERFACE -Xfatbin=-compress-all)
endif()

# What ptxas makes of a kernel is its own affair from version to version: only with the one that the kernels were tuned
# with is a spill an error for whoever builds. With others it is a warning.
set(_strict OFF)
if(FLASHCORE_WERROR OR CMAKE_CUDA_COMPILER_VERSION MATCHES "^13\\.0\\.")
  set(_strict ON)
endif()
option(FLASHCORE_SPILLS_ARE_ERRORS "Fail the build where a kernel that must not spill registers does" ${_strict})

# flashcore_add_kernels(<folder> ARCHS <archs…> SOURCES <files…> [NO_SPILLS] [SPILLS <pattern=bytes…>]): one kernel
# folder, compiled for its own architectures (a property of targets, not of files), becomes part of the library.
# NO_SPILLS: the build fails if a kernel spills or serialises products. SPILLS: kernels, by a pattern of their mangled
# names, that are known to spill, and up to how much.
function(flashcore_add_kernels folder)
  cmake_parse_arguments(PARSE_ARGV 1 arg "NO_SPILLS" "" "ARCHS;SOURCES;SPILLS")
  set(target flashcore_kernels_${folder})
  list(JOIN arg_ARCHS " " arch_words)
  add_library(${target} OBJECT ${arg_SOURCES})
  set_target_properties(${target} PROPERTIES
    CUDA_ARCHITECTURES "${arg_ARCHS}"
    CUDA_STANDARD_REQUIRED ON
    CUDA_EXTENSIONS OFF
    CUDA_VISIBILITY_PRESET hidden
    CUDA_RUNTIME_LIBRARY Static
    VISIBILITY_INLINES_HIDDEN ON
    POSITION_INDEPENDENT_CODE ON)
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/src)
  target_compile_definitions(${target} PRIVATE "FLASHCORE_ARCH_LIST=\"${arch_words}\"")
  target_link_libraries(${target} PRIVATE flashcore_kernel_flags)
  target_sources(flashcore PRIVATE $<TARGET_OBJECTS:${target}>)
  if(arg_NO_SPILLS)
    list(JOIN arg_SPILLS "|" limits)
    set(launcher ${CMAKE_COMMAND} -DSTRICT=${FLASHCORE_SPILLS_ARE_ERRORS} "-DLIMITS=${limits}"
      -P ${PROJECT_SOURCE_DIR}/cmake/CompileWithoutSpills.cmake -- ${CMAKE_CUDA_COMPILER_LAUNCHER})
    set_target_properties(${target} PROPERTIES CUDA_COMPILER_LAUNCHER "${launcher}")
  endif()
endfunction()
