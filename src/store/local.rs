//! One directory, held as an open descriptor and never left.
