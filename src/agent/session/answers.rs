//! When a container answers that has just arrived, and whose memory is still being fetched.
//!
//! How far its programs have come is seen in its connections, whatever they say on them: what they have sent, and
//! what has arrived and they have not read.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::super::client::AbortOnDrop;
use crate::conntrack::{Flow, Protocol};
use crate::netlink::Namespace;
use crate::netlink::sockets::{Diagnosis, Progress};

/// How long to wait between two looks.
const LOOK: Duration = Duration::from_millis(1);
/// So many connections are looked at for its first answer, which takes less than that.
const CONNECTIONS: usize = 64;
/// And so many afterwards, for as long as memory is fetched: a look at one takes some 10 microseconds.
const CONNECTIONS_LATER: usize = 4;
/// For how long its first answer is waited for: if its peers are silent there is none.
const LONGEST: Duration = Duration::from_secs(5);

/// What is seen of a container's answers. Its end is that of looking.
#[derive(Debug)]
pub(super) struct Answers {
    seen: Arc<Mutex<Seen>>,
    _looks: AbortOnDrop,
}

/// What has been seen so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// How long after it ran it sent something for the first time.
    pub first: Option<Duration>,
    /// For how long at most it read nothing of what was there, after that.
    pub unread: Option<Duration>,
}

impl Answers {
    /// Looks at a container with this network that runs from now on. None of its connections has sent anything
    /// since it was made here.
    pub fn watch(namespace: Namespace, flows: &[Flow]) -> Answers {
        let seen = Arc::<Mutex<Seen>>::default();
        let looks = tokio::spawn(look(namespace, connections(flows), seen.clone()));
        Answers {
            seen,
            _looks: AbortOnDrop(looks.abort_handle()),
        }
    }

    /// What has been seen.
    pub fn seen(self) -> Seen {
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The TCP connections to look at: the container's end of each, and its peer's.
fn connections(flows: &[Flow]) -> Vec<(SocketAddr, SocketAddr)> {
    let ends = |flow: &Flow| {
        let Protocol::Tcp {
            source,
            destination,
        } = flow.seen.protocol
        else {
            return None;
        };
        let from = SocketAddr::new(flow.seen.source, source);
        let to = SocketAddr::new(flow.seen.destination, destination);
        Some(match flow.seen.source == flow.container {
            true => (from, to),
            false => (to, from),
        })
    };
    flows.iter().filter_map(ends).take(CONNECTIONS).collect()
}

async fn look(
    namespace: Namespace,
    mut connections: Vec<(SocketAddr, SocketAddr)>,
    seen: Arc<Mutex<Seen>>,
) {
    let began = Instant::now();
    let mut sockets = match Diagnosis::open(&namespace) {
        Ok(sockets) => sockets,
        Err(error) => return unseen(&error),
    };
    let mut unread = vec![Unread::default(); connections.len()];
    let mut first = None;
    while !connections.is_empty() {
        for ((local, remote), unread) in connections.iter().zip(&mut unread) {
            let progress = match sockets.progress(*local, *remote) {
                Ok(progress) => progress,
                Err(error) => return unseen(&error),
            };
            // It may have gone.
            let Some(progress) = progress else { continue };
            if progress.sent > 0 && first.is_none() {
                first = Some(began.elapsed());
            }
            if first.is_some() {
                unread.looked(progress, began.elapsed());
            }
        }
        match first {
            Some(_) => {
                connections.truncate(CONNECTIONS_LATER);
                let longest = unread.iter().map(|unread| unread.longest).max();
                *seen.lock().unwrap_or_else(PoisonError::into_inner) = Seen {
                    first,
                    unread: longest,
                };
            }
            None if began.elapsed() >= LONGEST => return,
            None => {}
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn unseen(error: &crate::netlink::Error) {
    tracing::debug!(%error, "it cannot be seen when the container answers");
}

/// For how long a connection has lain unread.
#[derive(Debug, Clone, Copy, Default)]
struct Unread {
    /// How much had been read when it was looked at last.
    read: u64,
    /// Since when no more has been, of what is there.
    since: Option<Duration>,
    longest: Duration,
}

impl Unread {
    /// That is how far it had come then.
    fn looked(&mut self, progress: Progress, now: Duration) {
        // What it had not read when it was restored was not received here.
        let read = progress.received.wrapping_sub(progress.unread.into());
        if let Some(since) = self.since {
            self.longest = self.longest.max(now.saturating_sub(since));
        }
        if progress.unread == 0 {
            self.since = None;
        } else if self.since.is_none() || read != self.read {
            self.since = Some(now);
        }
        self.read = read;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_does_not_lie_unread() {
        let mut unread = Unread::default();
        let mut looks = [
            // It is restored with something that it has not read.
            (0, 3, 0),
            (5, 8, 10),
            // It reads all, and nothing comes.
            (5, 0, 15),
            (5, 0, 100),
            (6, 1, 101),
            (6, 1, 111),
            // It is busy, and reads.
            (9, 2, 112),
            (11, 2, 121),
            (13, 2, 131),
        ]
        .into_iter();
        let mut looked = |many| {
            for (received, left, ms) in looks.by_ref().take(many) {
                let progress = Progress {
                    sent: 1,
                    received,
                    unread: left,
                };
                unread.looked(progress, Duration::from_millis(ms));
            }
            unread.longest.as_millis()
        };
        assert_eq!(looked(2), 10);
        assert_eq!(looked(1), 15);
        assert_eq!(looked(3), 15);
        assert_eq!(looked(3), 15);
    }
}
