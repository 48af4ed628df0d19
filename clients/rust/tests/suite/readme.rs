//! The first example of README.md, as it stands there.

use tokio::process::Command;

use crate::pb;
use crate::provider::{Provider, Said, program};
use crate::scripted::{Sidecar, deciding, ticket};

#[tokio::test]
async fn the_readme_s_gateway_works() {
    let sidecar = Sidecar::new(deciding([ticket()]));
    let provider = Provider::new(|_| Said::completion()).await;
    let ran = Command::new(program("readme"))
        .env("KEYTURN_ADDRESS", &sidecar.target)
        .env("OPENAI_API_KEY", "platform")
        .env("OPENAI_BASE_URL", &provider.url)
        .kill_on_drop(true)
        .output()
        .await
        .unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    assert!(String::from_utf8_lossy(&ran.stdout).contains("gpt-4o-2024"));
    assert_eq!(provider.seen()[0].0["authorization"], "Bearer platform");
    let record = sidecar.records().remove(0);
    assert_eq!(record.outcome(), pb::Outcome::Success);
    assert_eq!(record.usage, Some(pb::Usage { input_tokens: 11, output_tokens: 5, ..Default::default() }));
}
