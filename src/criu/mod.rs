//! criu
