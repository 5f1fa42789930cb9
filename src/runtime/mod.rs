//! Being the OCI runtime that Podman calls, for the direct engine.
//!
//! Most of what a move by Podman alone costs is not CRIU: Podman collects an archive at the source while
//! the container is frozen, and at the destination unpacks it, mounts, sets up the network and starts a
//! monitor, all before CRIU begins. None of that needs the container's memory. So livemig stands between
//! Podman and the runtime ([`setup`]), as a [`wrapper`] that hands everything on, but for two calls:
//!
//! - a *checkpoint* that livemig has asked Podman for is answered at once, without one. Podman then
//!   writes the archive of everything but memory, the **shell**, of a container that runs on;
//! - the *restore* of such a shell waits. By then Podman has made the container at the destination up to
//!   the last step. It goes on when the memory is there.
//!
//! What Podman asked for is known from its own command line ([`invocation`]); whoever waits for its call is
//! met at a socket ([`rendezvous`]). If nobody waits, the wrapper becomes the real runtime.
//!
//! The real runtimes are started before the container is frozen, on either side. What they call as CRIU is
//! livemig again ([`held_criu`]), which becomes CRIU in the moment in which it is needed ([`standby`]). While
//! it copies memory of a container that is to go on, a process of its own sees to it that it does ([`Thaw`]), and
//! where memory comes when a container runs already, that it does not go on without ([`Keeper`]).

mod checkpoint;
mod companion;
mod error;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
pub mod held_criu;
pub mod invocation;
mod keeper;
pub mod rendezvous;
pub mod setup;
pub mod standby;
mod thaw;
pub mod wrapper;

pub use checkpoint::Checkpoint;
pub use error::Error;
pub use invocation::{Invocation, Verb, names_cgroup_in_rounds};
pub use keeper::{Faults, Keeper};
pub use rendezvous::{Arrived, Outcome, Rendezvous};
pub use standby::{CriuOption, OnStandby, Standby};
pub(crate) use thaw::NAME as THAW;
pub use thaw::Thaw;

/// What the functions of this module return.
pub type Result<T, E = Error> = std::result::Result<T, E>;
