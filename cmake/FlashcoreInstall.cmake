# Installs the library, its headers and the package that find_package(flashcore) finds.
include(CMakePackageConfigHelpers)

set(_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/flashcore)
install(TARGETS flashcore EXPORT flashcore-targets
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR}
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
  RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
install(DIRECTORY include/flashcore DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT flashcore-targets NAMESPACE flashcore:: DESTINATION ${_package_dir})
configure_package_config_file(cmake/flashcore-config.cmake.in flashcore-config.cmake INSTALL_DESTINATION ${_package_dir})
write_basic_package_version_file(flashcore-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES
  ${CMAKE_CURRENT_BINARY_DIR}/flashcore-config.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/flashcore-config-version.cmake
  DESTINATION ${_package_dir})
