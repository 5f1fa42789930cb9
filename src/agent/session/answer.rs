//! When a container answers that has just arrived, and whose memory is still being fetched.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::conntrack::{Flow, Protocol};
use crate::netlink::Namespace;
use crate::netlink::sockets::Diagnosis;

/// How long to wait between two looks.
const LOOK: Duration = Duration::from_millis(1);
/// So many connections are looked at, which takes less than that.
const CONNECTIONS: usize = 64;
/// For how long its answer is waited for: if its peers are silent there is none.
const LONGEST: Duration = Duration::from_secs(5);

/// The TCP connections to look at: the container's end of each, and its peer's.
pub(super) fn connections(flows: &[Flow]) -> Vec<(SocketAddr, SocketAddr)> {
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

/// Waits until a container with this network sends something over one of these connections, none of which has
/// sent anything before it arrived. Returns how long that took, if it did.
pub(super) async fn first(
    namespace: Namespace,
    connections: Vec<(SocketAddr, SocketAddr)>,
) -> Option<Duration> {
    let began = Instant::now();
    let mut sockets = Diagnosis::open(&namespace).ok()?;
    while began.elapsed() < LONGEST && !connections.is_empty() {
        match sockets.has_sent(&connections) {
            Ok(true) => return Some(began.elapsed()),
            Ok(false) => tokio::time::sleep(LOOK).await,
            Err(error) => {
                tracing::debug!(%error, "it cannot be seen when the container answers");
                return None;
            }
        }
    }
    None
}
