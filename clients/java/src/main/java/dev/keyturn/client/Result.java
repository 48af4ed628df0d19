package dev.keyturn.client;

/**
 * An answer or an error for one item of a batch: the other one is null.
 *
 * @param <T> the kind of answer
 * @param answer the answer
 * @param error why there is none
 */
public record Result<T>(T answer, KeyturnException error) {
  static <T> Result<T> of(T answer) {
    return new Result<>(answer, null);
  }

  static <T> Result<T> failed(KeyturnException error) {
    return new Result<>(null, error);
  }

  /**
   * The answer.
   *
   * @throws KeyturnException the error, when there is none
   */
  public T orThrow() {
    if (error != null) {
      throw error;
    }
    return answer;
  }
}
