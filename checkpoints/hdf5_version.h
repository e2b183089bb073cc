// Which HDF5 writes the training states, for who does not include HDF5.
#pragma once

#include <string>

namespace baleen {

// Of the library that runs: "1.10.8". Empty when it cannot be asked.
std::string Hdf5Version();

}  // namespace baleen
