//! A hold at the destination: what comes for a container that is being restored waits, and is let in
//! no faster than its sockets take it.

use super::keeper::Order;
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
    /// them; everything else at once. What a container that comes home says, and what its peers
    /// sent to it here, goes on waiting for [`Intake::finish`].
    pub fn open(&self, container: &Namespace) {
        self.hold.order(Order::Release {
            to: To::Destination,
            pace: Pace::Sockets(container.clone()),
            until_finish: true,
        });
    }

    /// The source has let go of everything: returns as soon as nothing waits any more.
    ///
    /// # Errors
    /// As [`Hold::release`].
    pub async fn finish(mut self) -> Result<Released> {
        self.hold.order(Order::Finish);
        self.hold.passed().await
    }

    /// The container goes on at the source: what it has said here is dropped, everything else goes
    /// on.
    ///
    /// # Errors
    /// As [`Hold::release`].
    pub async fn undo(self) -> Result<Released> {
        self.hold.release(To::Source, Pace::Unpaced).await
    }
}
