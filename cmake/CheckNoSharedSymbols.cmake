# Fails if an object file has a symbol that the linker shares with other object files.
#
#   cmake -D NM=nm -D "OBJECTS=a.o|b.o" -P CheckNoSharedSymbols.cmake
#
# Of a weak or unique symbol, such as an inline function's, the linker keeps any one copy for all. In an object compiled
# for a newer processor that copy would run on older ones too, and stop at the first instruction they do not know.
string(REPLACE "|" ";" OBJECTS "${OBJECTS}")
if(NOT OBJECTS)
  message(FATAL_ERROR "no object files given")
endif()
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} --demangle --format=posix --defined-only ${object}
    OUTPUT_VARIABLE symbols COMMAND_ERROR_IS_FATAL ANY)
  string(REGEX MATCHALL "[^\n]+ [WVu] [^\n]*" shared "${symbols}")
  foreach(symbol IN LISTS shared)
    message(SEND_ERROR "${object}: ${symbol}")
  endforeach()
endforeach()
