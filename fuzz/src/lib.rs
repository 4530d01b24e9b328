//! One function per decoder of outside bytes, for fuzzing and for replaying the corpus.

mod decoders;

pub use decoders::*;
