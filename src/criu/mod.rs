//! What livemig knows about CRIU, which does the actual freezing of processes into files: whether
//! this host can do it ([`feature`]), whether two hosts can do it together ([`check`]), what it
//! reports afterwards ([`stats`]), how it is configured ([`config`]), how to stop a container's
//! processes before it starts ([`freezer`]), and what keeps it from waiting when it makes them anew
//! ([`joining`]).
//!
//! CRIU itself is run by the container runtimes. livemig runs it only to ask what it supports.

mod cgroup;
pub mod check;
pub mod config;
mod error;
pub mod feature;
pub mod freezer;
mod images;
pub mod joining;
pub mod pages;
pub mod processes;
pub mod stats;
mod version;

pub use check::{Code, Finding, Severity, Side};
pub use config::NetworkLock;
pub use error::Error;
pub use feature::{Criu, Features, Runtime};
pub use freezer::{Freezer, State};
pub use stats::{DumpStats, RestoreStats};
pub use version::Version;

/// What the functions of this module return.
pub type Result<T, E = Error> = std::result::Result<T, E>;
