# For a bundle that runs on other machines: Abseil, yaml-cpp and HDF5 by their static archives, which Debian and Ubuntu
# ship beside the shared libraries. What stays shared is the C and C++ runtime, MPI, and what is loaded at run time.

# baleen_link_statically(name...): imported targets of these names, or of these namespaces, point at the archive beside
# their shared library.
function(baleen_link_statically)
  get_directory_property(targets IMPORTED_TARGETS)
  foreach(name ${ARGN})
    set(chosen ${targets})
    list(FILTER chosen INCLUDE REGEX "^${name}(::.*)?$")
    foreach(target ${chosen})
      get_target_property(type ${target} TYPE)
      if(NOT type STREQUAL "SHARED_LIBRARY")
        continue()
      endif()
      get_target_property(configurations ${target} IMPORTED_CONFIGURATIONS)
      foreach(configuration ${configurations})
        get_target_property(shared ${target} IMPORTED_LOCATION_${configuration})
        string(REGEX REPLACE "\\.so[.0-9]*$" ".a" archive "${shared}")
        if(NOT EXISTS "${archive}")
          message(FATAL_ERROR "BALEEN_STATIC_LIBRARIES: ${target} has no ${archive}")
        endif()
        set_target_properties(${target} PROPERTIES IMPORTED_LOCATION_${configuration} "${archive}"
                                                   IMPORTED_SONAME_${configuration} "")
        set_target_properties(${target} PROPERTIES IMPORTED_NO_SONAME TRUE)
      endforeach()
    endforeach()
  endforeach()
endfunction()

# baleen_static_hdf5(variable): the archives of serial HDF5 and of its filters. Its S3 driver is not used, and with it
# neither curl nor OpenSSL.
function(baleen_static_hdf5 variable)
  set(archives "")
  foreach(name hdf5 sz aec z)
    find_library(BALEEN_STATIC_${name} NAMES lib${name}.a PATH_SUFFIXES hdf5/serial)
    if(NOT BALEEN_STATIC_${name})
      message(FATAL_ERROR "BALEEN_STATIC_LIBRARIES: no lib${name}.a (apt-get install libhdf5-dev libaec-dev zlib1g-dev)")
    endif()
    list(APPEND archives ${BALEEN_STATIC_${name}})
  endforeach()
  set(${variable} ${archives} ${CMAKE_DL_LIBS} m Threads::Threads PARENT_SCOPE)
endfunction()
