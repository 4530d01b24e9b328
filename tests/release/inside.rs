//! The way back, without a socket in between: it is in force before anything is written.
