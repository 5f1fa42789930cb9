//! A hold at the destination: what comes for a container that is being restored waits, and is let in
//! no faster than its sockets take it.

use super::keeper::{Order, Terms};
use super::{Hold, HoldSpec, Pace, Released, Reserved, To};
use crate::conntrack::Result;
use crate::netlink::Namespace;

/// What comes out of a hop for a container that arrives here.
///
/// Dropping it lets everything go on as if the container were not here.
#[derive(Debug)]
pub struct Intake {
    hold: Hold,
}

impl Intake {
    /// Begins to hold, in the calling thread's network namespace. The specification is one of
    /// [`Side::Arriving`](super::Side::Arriving), and written into the journal by now.
    ///
    /// # Errors
    /// As [`Reserved::prepare`].
    pub async fn start(reserved: Reserved, spec: HoldSpec) -> Result<Intake> {
        let mut hold = reserved.prepare(spec).await?;
        hold.hold_newcomers()?;
        hold.hold_all()?;
        Ok(Intake { hold })
    }

    /// The container runs: datagrams are let in as its sockets, in its network namespace, take
    /// them.
    pub fn open(&self, container: &Namespace) {
        self.hold.order(Order::Release(Terms {
            to: To::Destination,
            pace: Pace::Sockets(container.clone()),
            until_finish: true,
        }));
    }

    /// How many packets have been held so far.
    pub fn held(&self) -> u64 {
        self.hold.held()
    }

    /// The source has let go of everything: returns as soon as nothing waits any more.
    ///
    /// # Errors
    /// As [`Hold::release`].
    pub async fn finish(mut self) -> Result<Released> {
        self.hold.order(Order::Finish);
        self.hold.passed().await
    }

    /// The hold that this is, to be undone like any other: released to [`To::Source`], it drops what
    /// the container has said here.
    pub fn into_hold(self) -> Hold {
        self.hold
    }
}
