//! livemig moves a running Podman container to another Linux host while its TCP and UDP peers go on
//! talking to it.
//!
//! ```no_run
//! # async fn example() -> Result<(), livemig::Error> {
//! use livemig::{Request, migrate};
//!
//! let request = Request::new("web", "host-b");
//! let report = migrate(&request, &mut |event| println!("{event:?}")).await?;
//! println!("{} ms without service, {} flows kept", report.downtime.as_millis(), report.flows.len());
//! # Ok(())
//! # }
//! ```
//!
//! A connection's address translation stays where it is, on the host that the peer connected to. Its
//! packets wait there in the kernel while the container is between two hosts, and then take a tunnel
//! to where it runs:
//!
//! ```text
//!  before                                     after
//!  peer ──▶ host A :8080                      peer ──▶ host A :8080 ════ WireGuard ════▶ host B
//!             ▼ 10.88.0.5:80                             │ mark: hop to B                 ▼
//!           container                                    ╰──────────────────────▶ container 10.88.0.5:80
//! ```
//!
//! | module | |
//! | --- | --- |
//! | [`migration`] | the phases, in order; what each changes is a value that can be undone |
//! | [`agent`] | trust between hosts, and the destination's side of a migration |
//! | [`podman`] | the libpod API: checkpoint, restore, and what the destination has to have |
//! | [`criu`] | what this host can do, the freezer, early refusals |
//! | [`runtime`] | being the OCI runtime that Podman calls, for the direct engine |
//! | [`bundle`] | the container's changed files, and everything of it as one stream |
//! | [`tunnel`] | hops: WireGuard between two hosts, in the kernel or in user space |
//! | [`conntrack`] | flows: reading, inserting, steering and holding them |
//! | [`netlink`] | the kernel's interface under the last three |
//! | [`overview`] | what is where on this host |

pub mod agent;
pub mod bundle;
mod config;
pub mod conntrack;
pub mod criu;
mod error;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
pub mod migration;
pub mod netlink;
pub mod overview;
pub mod podman;
pub mod runtime;
pub mod tunnel;

pub use config::Config;
pub use error::{Class, Error, Result};
pub use migration::{Report, Request, migrate};
