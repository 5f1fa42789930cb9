//! When a container answers that has just arrived, and whose memory is still being fetched.

use std::time::{Duration, Instant};

use crate::netlink::Namespace;
use crate::netlink::sockets::Diagnosis;

/// How long to wait between two looks at least. After a look that takes long, as one at thousands of connections
/// does, it is three times as long, so that there is time for other work.
const LOOK: Duration = Duration::from_millis(1);
/// For how long its answer is waited for: if its peers are silent there is none.
const LONGEST: Duration = Duration::from_secs(5);

/// Waits until a container with this network sends something over one of its TCP connections, none of which has
/// sent anything before it arrived. Returns how long that took, if it did.
pub(super) async fn first(namespace: Namespace) -> Option<Duration> {
    let began = Instant::now();
    let mut sockets = Diagnosis::open(&namespace).ok()?;
    while began.elapsed() < LONGEST {
        let look = Instant::now();
        match sockets.has_sent() {
            Ok(true) => return Some(began.elapsed()),
            Ok(false) => tokio::time::sleep(LOOK.max(3 * look.elapsed())).await,
            Err(error) => {
                tracing::debug!(%error, "it cannot be seen when the container answers");
                return None;
            }
        }
    }
    None
}
