//! What crosses from one host to the other when a container moves: the files that it changed, and
//! the stream that carries them together with Podman's checkpoint.
//!
//! Podman has a difference of the root file system of its own, and loses data with it: a file that
//! came with the image and was *changed* is left out unless the same path happens to exist on the
//! host. So livemig tells Podman to leave the root file system alone, makes the difference itself
//! ([`delta`]), and puts it in front of Podman's archive ([`splice`]) under the names and in the
//! form that Podman's import applies anyway. [`transfer`] takes the whole from host to host, and
//! makes sure that Podman never acts on bytes that differ from those that were sent.

pub mod apply;
mod archive;
pub mod changes;
mod checksum;
mod compression;
mod content;
pub mod delta;
mod entries;
mod error;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod header;
pub mod images;
mod scan;
pub mod splice;
#[cfg(test)]
mod test_trees;
pub mod transfer;
mod tree;
pub mod vetted;
mod walker;

pub use apply::{Applied, Limits, Refusal, apply, persist};
pub use changes::{Changes, Mirror, Round, Source, TreeId};
pub use checksum::Checksum;
#[cfg(test)]
pub(crate) use compression::Compression;
pub use delta::{Delta, DeltaFile, Layers, Skipped, Summary};
pub use error::Error;
pub use header::{beheaded, headed};
pub use images::{images, write_images};
pub use scan::Pace;
pub use splice::{Captured, spliced, watched, without_volumes};
#[cfg(test)]
pub(crate) use transfer::send_as;
pub use transfer::{Progress, receive, send};

/// What the functions of this module return.
pub type Result<T, E = Error> = std::result::Result<T, E>;
