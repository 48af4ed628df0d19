package dev.keyturn.client;

import java.time.Instant;
import java.util.Map;

/**
 * The user's own key for one request.
 *
 * @param handle what to send back in a record; prints cut
 * @param keyId the id of the stored key
 * @param provider the provider the key is for
 * @param hint the last four characters of the secret, to show to its owner
 * @param secret the key itself; null when it was left to {@link KeyturnClient#redeem}
 * @param authHeader the header that signs a request, e.g. {@code Authorization}
 * @param authPrefix what stands before the secret in that header, e.g. {@code "Bearer "}
 * @param baseUrl where the provider's API is, e.g. {@code https://api.openai.com/v1}
 * @param expireTime until when it may be redeemed; a record is taken 7 days longer. Null in an
 *     explanation
 */
public record KeyHandle(
    SealedHandle handle,
    String keyId,
    String provider,
    String hint,
    Secret secret,
    String authHeader,
    String authPrefix,
    String baseUrl,
    Instant expireTime)
    implements Settles {

  /**
   * The one header that signs a request with this key. It holds the secret: never log it.
   *
   * @throws IllegalStateException when the secret was not delivered with the decision
   */
  public Map<String, String> headers() {
    if (secret == null) {
      throw new IllegalStateException("the secret is not here: fetch it once with redeem()");
    }
    return Map.of(authHeader, authPrefix + secret.reveal());
  }
}
