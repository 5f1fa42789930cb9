//! A migration that stands still at a moment that was chosen: what `make test-faults` needs to strike it
//! there, and not a millisecond later. Debug builds only.

use livemig::migration::Event;
use rustix::process::{Signal, getpid, kill_process};

/// The moment, as `started:PHASE` or `finished:PHASE`.
const MOMENT: &str = "LIVEMIG_STAND_STILL";

/// Stops the whole process if this is the moment, as SIGSTOP does, until somebody sends SIGCONT.
pub fn at(event: &Event) {
    let this = match event {
        Event::Started { phase } => format!("started:{phase}"),
        Event::Finished { phase, .. } => format!("finished:{phase}"),
        _ => return,
    };
    if std::env::var(MOMENT).is_ok_and(|moment| moment == this) {
        // To oneself this cannot fail.
        let _ = kill_process(getpid(), Signal::STOP);
    }
}
