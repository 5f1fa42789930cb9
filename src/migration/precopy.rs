//! Copying memory while the container runs.
//!
//! The rest engine makes no rounds: Podman's API writes one pre-dump at most, and cannot restore from
//! it. The phase stands in the list so that a report has the same phases whatever the engine.

use super::Migration;
use crate::Result;

pub(super) async fn precopy(_migration: &mut Migration<'_>) -> Result<()> {
    Ok(())
}
