# GoogleTest, the testing variant of the library, and how tests are found and labelled.
set(FLASHCORE_GTEST_SOURCE "" CACHE PATH "A source tree of GoogleTest to build. Empty: the one that is installed")

function(_flashcore_build_gtest)
  set(BUILD_SHARED_LIBS OFF)
  set(BUILD_GMOCK OFF)
  set(INSTALL_GTEST OFF)
  add_subdirectory(${FLASHCORE_GTEST_SOURCE} googletest EXCLUDE_FROM_ALL SYSTEM)
endfunction()

if(FLASHCORE_GTEST_SOURCE)
  _flashcore_build_gtest()
else()
  find_package(GTest QUIET)
endif()
set(FLASHCORE_HAVE_GTEST OFF)
if(NOT TARGET GTest::gtest)
  message(WARNING "flashcore: GoogleTest was not found, so the C++ tests are left out. "
    "Install it (Debian: apt install libgtest-dev) or set GTest_ROOT; -DFLASHCORE_TESTS=OFF silences this.")
  return()
endif()
set(FLASHCORE_HAVE_GTEST ON)
include(GoogleTest)

# The objects of the library again, in an archive: tests reach private functions, which the shared library hides, and
# nothing is compiled twice.
function(flashcore_add_testing_library)
  get_property(targets DIRECTORY ${PROJECT_SOURCE_DIR} PROPERTY BUILDSYSTEM_TARGETS)
  list(FILTER targets INCLUDE REGEX "^flashcore_kernels_")
  set(objects $<TARGET_OBJECTS:flashcore>)
  foreach(target IN LISTS targets)
    list(APPEND objects $<TARGET_OBJECTS:${target}>)
  endforeach()
  add_library(flashcore_testing STATIC ${objects})
  set_target_properties(flashcore_testing PROPERTIES LINKER_LANGUAGE CXX)
  target_include_directories(flashcore_testing PUBLIC ${PROJECT_SOURCE_DIR}/include)
  target_compile_features(flashcore_testing PUBLIC cxx_std_20)
  target_link_libraries(flashcore_testing PUBLIC ${CMAKE_DL_LIBS})
  if(FLASHCORE_HAVE_CUDA)
    target_link_libraries(flashcore_testing PUBLIC CUDA::cudart_static)
  endif()
endfunction()

# Tests with "cuda" in their name get the label cuda; the small ones among them, fit for compute-sanitizer, get
# cuda.sanitizer (`ctest -L cuda` takes both, since it looks for parts of labels). Tests are found when ctest starts,
# so that the device is that of the day.
function(flashcore_discover_tests program)
  set(large "*ReferenceShapes*:*SameBits*:*OddSizes*")
  gtest_discover_tests(${program} DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 60
    TEST_FILTER "-*cuda*:*Cuda*" PROPERTIES TIMEOUT 300)
  gtest_discover_tests(${program} DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 60
    TEST_FILTER "*cuda*:*Cuda*:-${large}" PROPERTIES TIMEOUT 300 LABELS cuda.sanitizer)
  gtest_discover_tests(${program} DISCOVERY_MODE PRE_TEST DISCOVERY_TIMEOUT 60
    TEST_FILTER "*ReferenceShapes*cuda*:*SameBits*cuda*:*OddSizes*cuda*" PROPERTIES TIMEOUT 300 LABELS cuda)
endfunction()

# Installs the build into a prefix of its own, then configures, builds and runs programs against it: install/ and the
# example in examples/cpp.
function(flashcore_add_install_test)
  set(work ${CMAKE_CURRENT_BINARY_DIR}/install_test)
  add_test(NAME install.prefix
    COMMAND ${CMAKE_COMMAND} --install ${PROJECT_BINARY_DIR} --prefix ${work}/prefix --config $<CONFIG>)
  set_tests_properties(install.prefix PROPERTIES FIXTURES_SETUP flashcore_prefix TIMEOUT 120)
  _flashcore_add_consumer_test(consumer ${CMAKE_CURRENT_SOURCE_DIR}/install consumer ${work}
    -DFLASHCORE_EXPECTED_VERSION=${PROJECT_VERSION})
  _flashcore_add_consumer_test(example ${PROJECT_SOURCE_DIR}/examples/cpp attention ${work})
endfunction()

function(_flashcore_add_consumer_test name source program work)
  add_test(NAME install.${name}
    COMMAND ${CMAKE_CTEST_COMMAND}
      --build-and-test ${source} ${work}/${name}
      --build-generator ${CMAKE_GENERATOR} --build-makeprogram ${CMAKE_MAKE_PROGRAM} --build-noclean
      --build-options
        -DCMAKE_PREFIX_PATH=${work}/prefix -DCMAKE_CXX_COMPILER=${CMAKE_CXX_COMPILER}
        -DCMAKE_BUILD_TYPE=Release ${ARGN}
      --test-command ${program})
  set_tests_properties(install.${name} PROPERTIES FIXTURES_REQUIRED flashcore_prefix TIMEOUT 300)
endfunction()

# What is compiled for one instruction set stays in its own object file.
function(flashcore_add_symbols_test)
  set(objects $<FILTER:$<TARGET_OBJECTS:flashcore>,INCLUDE,/isa_[a-z0-9]+\\.>)
  add_test(NAME cpu.instruction_sets_share_no_function
    COMMAND ${CMAKE_COMMAND} -D NM=${CMAKE_NM} -D "OBJECTS=$<JOIN:${objects},|>"
      -P ${PROJECT_SOURCE_DIR}/cmake/CheckNoSharedSymbols.cmake)
endfunction()
