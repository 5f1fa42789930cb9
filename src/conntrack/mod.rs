//! Steer, don't rewrite: how a container's connections follow it to another host.
//!
//! A client's packets go on arriving at the host it connected to, the *anchor*, and are still
//! translated there by the same conntrack entry. That entry is never touched but for some bits of
//! its mark, which say into which hop its packets go instead of to the local bridge:
//!
//! ```text
//!             anchor                                          destination
//! client ──▶  prerouting                                      prerouting ──▶ container
//!             -310  hold: SYNs to published ports             (the entry was inserted before the
//!             -200  conntrack finds the entry                  container ran, un-NATed; its mark
//!             -150  hold: packets wait in a queue              sends replies back into the hop)
//!             -140  guard: what may come out of a hop
//!             -140  steer: mark of the entry ─▶ mark of
//!                   the packet ─▶ routing table of the hop ═══▶ WireGuard
//! ```
//!
//! | module | |
//! | --- | --- |
//! | [`Tuple`], [`Entry`], [`Mark`] | what the kernel knows of a connection, as values that cross the wire |
//! | [`Table`] | the kernel's table: dump, insert, mark, delete, events |
//! | [`Flow`] | an entry as seen from the container: who opened it, what each host has to do |
//! | [`steer`] | the nftables rules that turn marks into routes, and guard the hops |
//! | [`alias`] | other names for peers whose address the destination has too |
//! | [`forward`] | new connections that are carried after a container |
//! | [`hold`] | keeping packets in the kernel while the container is nowhere |

pub mod alias;
mod counting;
mod entry;
mod error;
mod events;
mod fence;
mod flow;
pub mod forward;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod gate;
pub mod hold;
mod mark;
mod published;
mod ruleset;
pub mod steer;
mod table;
mod tuple;
mod wire;

pub use counting::Counting;
pub use entry::{Counters, Entry, SctpInfo, Status, TcpInfo, TcpSide, TcpState};
pub use error::{Error, Result};
pub use events::{Change, Event, Events};
pub use fence::Fence;
pub use flow::{CannotKeep, Flow, Opening};
pub use gate::Gate;
pub use mark::{Direction, Mark};
pub use ruleset::TABLE;
pub use table::{Family, Table};
pub use tuple::{Protocol, Tuple};
