package dev.keyturn.client;

import static org.junit.jupiter.api.Assertions.assertEquals;

import com.google.protobuf.Descriptors.EnumDescriptor;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import org.junit.jupiter.api.Test;

/** The client's words are those of the contract, in the order of their numbers. */
class ContractTest {
  private static List<String> words(EnumDescriptor kind) {
    String prefix =
        kind.getName().replaceAll("([a-z])([A-Z])", "$1_$2").toUpperCase(java.util.Locale.ROOT);
    List<String> words = new ArrayList<>();
    for (int number = 0; number < kind.getValues().size(); number++) {
      words.add(kind.findValueByNumber(number).getName().substring(prefix.length() + 1));
    }
    return words;
  }

  private static List<String> names(Enum<?>[] values) {
    return Arrays.stream(values).map(Enum::name).toList();
  }

  private static void assertAnswered(Enum<?>[] values, EnumDescriptor kind) {
    List<String> expected = words(kind);
    expected.add("UNRECOGNIZED");
    assertEquals(expected, names(values));
  }

  @Test
  void theWordsOfAnswers() {
    assertAnswered(Mode.values(), dev.keyturn.v1.Mode.getDescriptor());
    assertAnswered(Reason.values(), dev.keyturn.v1.Reason.getDescriptor());
    assertAnswered(DenialReason.values(), dev.keyturn.v1.DenialReason.getDescriptor());
    assertAnswered(KeyState.values(), dev.keyturn.v1.KeyState.getDescriptor());
    assertAnswered(CostSource.values(), dev.keyturn.v1.CostSource.getDescriptor());
    assertAnswered(Durability.values(), dev.keyturn.v1.Durability.getDescriptor());
  }

  @Test
  void theWordsOfRequests() {
    List<String> outcomes = words(dev.keyturn.v1.Outcome.getDescriptor());
    assertEquals(outcomes.subList(1, outcomes.size()), names(Outcome.values()));
    List<String> constraints = words(dev.keyturn.v1.Constraint.getDescriptor());
    assertEquals(constraints.subList(1, constraints.size()), names(Constraint.values()));
    for (Outcome outcome : Outcome.values()) {
      assertEquals(outcome, Wire.outcome(Wire.number(outcome)));
    }
    assertEquals(Outcome.UNKNOWN, Wire.outcome(99));
  }

  @Test
  void theVersionIsThatOfThePackage() throws IOException {
    String pom = Files.readString(Path.of("pom.xml"));
    String version = pom.split("<version>", 2)[1].split("</version>", 2)[0];
    assertEquals(version, Connection.VERSION);
  }
}
