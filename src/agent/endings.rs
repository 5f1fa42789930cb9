//! Hearing that connections end, so that hops go when nobody needs them any more.

use std::time::Duration;

use futures::{FutureExt, StreamExt};
use tokio::time::Instant;

use crate::Result;
use crate::conntrack::{Change, Event, Events, Table};
use crate::netlink::Namespace;

/// What ends within this time of another is looked at together with it.
const TOGETHER: Duration = Duration::from_millis(200);

/// The ends of connections that take a hop.
///
/// Of a connection that is older than the listening the kernel may not tell ([`Events`]): whoever
/// listens has to look from time to time as well.
#[derive(Debug, Default)]
pub(super) struct Endings {
    events: Option<Events>,
    /// When the first of those ended that are to be looked at together.
    heard: Option<Instant>,
}

impl Endings {
    /// Begins to listen, or ends it: without a hop there is nothing to hear, and a host may have many
    /// connections of others.
    pub(super) fn listen(&mut self, listen: bool) {
        if !listen {
            *self = Endings::default();
        } else if self.events.is_none() {
            match open() {
                Ok(events) => self.events = Some(events),
                Err(error) => tracing::debug!(%error, "cannot hear connections end"),
            }
        }
    }

    /// Waits until one has ended, or some at the same time. Without listening, for ever.
    ///
    /// Dropped before that, it has forgotten nothing when it is called again.
    pub(super) async fn next(&mut self) {
        let Some(events) = &mut self.events else {
            return std::future::pending().await;
        };
        let heard = loop {
            if let Some(heard) = self.heard {
                break heard;
            }
            match events.next().await {
                Some(Ok(Event::Connection { entry, .. })) if !entry.mark.is_steered() => {}
                Some(Ok(_)) => self.heard = Some(Instant::now()),
                Some(Err(_)) | None => {
                    self.events = None;
                    return;
                }
            }
        };
        tokio::time::sleep_until(heard + TOGETHER).await;
        while let Some(Some(_)) = events.next().now_or_never() {}
        self.heard = None;
    }
}

fn open() -> Result<Events> {
    let table = Table::open(&Namespace::current()?)?;
    Ok(table.events(&[Change::Destroy])?)
}
