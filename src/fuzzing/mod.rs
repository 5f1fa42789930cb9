//! One function for each reader of bytes that come from outside, for tests that throw bytes at it.
//!
//! Most of these readers are nobody's business outside of this crate, and are private. Making them
//! public for the sake of a fuzzer would promise them to every user of the library; so there is this
//! door, which exists only in the crate's own tests and where `cargo fuzz` builds it (`--cfg fuzzing`).
//!
//! A function returns whatever it was given: what is no message is refused, and that is no finding. It
//! *panics* where a reader does not keep what it promises: what was read can be written and read again,
//! a stream reads the same however it is cut, nothing outside of a directory is touched, what passes is
//! understood by the next reader in the same way. An endless loop and memory without a bound are found
//! by whoever calls.
//!
//! The same functions serve two ends:
//! - `make fuzz` has libFuzzer look for inputs that lead where none has led before (`fuzz/`);
//! - `make test` gives each the corpus (`fuzz/corpus`) and some thousand inputs made from it, which takes
//!   seconds and needs nothing but cargo ([`tests`]).

mod agent;
mod host;
mod kernel;
mod scratch;
#[cfg(test)]
mod seeds;
pub(crate) mod tar;
#[cfg(test)]
mod tests;

pub use agent::{documents, protocol, token};
pub(crate) use agent::{flows as read_flows, read};
pub(crate) use scratch::Trees;

pub use crate::bundle::fuzzing::{files, header, images, transfer, vetted, walker};
pub use host::{fetch, pages, podman, runtime, stats};
pub use kernel::{conntrack, netlink, packets, queue, sockets};

/// A reader that is tested.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// The name of its corpus and of its program in `fuzz/`.
    pub name: &'static str,
    /// Has it read.
    pub read: fn(&[u8]),
}

macro_rules! targets {
    ($($name:ident),* $(,)?) => {
        /// All of them.
        pub const TARGETS: &[Target] = &[$(Target { name: stringify!($name), read: $name }),*];
    };
}

targets![
    conntrack, documents, fetch, files, header, images, netlink, packets, pages, podman, protocol,
    queue, runtime, sockets, stats, token, transfer, vetted, walker,
];

/// Takes the first byte off, which says in which way the rest is meant.
pub(crate) fn choice(input: &[u8]) -> (u8, &[u8]) {
    input
        .split_first()
        .map_or((0, input), |(first, rest)| (*first, rest))
}

/// In pieces of a size that follows from a choice: from byte by byte to all at once.
pub(crate) fn pieces(input: &[u8], choice: u8) -> impl Iterator<Item = &[u8]> {
    const SIZES: [usize; 4] = [usize::MAX, 512, 100, 1];
    let size = SIZES[usize::from(choice) % SIZES.len()];
    input.chunks(size.min(input.len()).max(1))
}

/// Waits for something that needs nothing but processor time.
pub(crate) fn wait_for<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime
        .expect("a runtime without drivers asks the system for nothing")
        .block_on(future)
}
